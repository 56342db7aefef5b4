"""Refuse tokens that were ranked by their centres although two of them depend on the same two cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv
from attn_monitor.capture.observe.random_projections import FINE, relative_change
from attn_monitor.capture.token_places.centres import SMALL, Cells, Ranked
from attn_monitor.capture.token_places.site_places import PlaceSearch
from attn_monitor.capture.token_places.synthetic_images import middles_changed
from attn_monitor.grid import Grid, GridGeometry


def refuse_shared_cells(search: PlaceSearch, ranked: Ranked) -> PlaceSearch:
    """Refuse sites where two tokens depend on the same two cells: they share one centre and are ranked by chance.

    Other noise in the middles of every second cell or row changes such a token although its own cell stays the same,
    and in the mosaics both tokens change as much with the one cell as with the other. In a small grid, where such
    cells are few, this is asked of each cell alone. Where most tokens change like this, their fields overlap too much
    for this test, and the site is kept.
    """
    reasons: dict[SiteKey, str] = {}
    grids: dict[tuple[Cells, GridGeometry | None], list[SiteKey]] = {}
    for key in ranked.keys:
        layout = search.sites[key].layout
        if layout is not None and layout.evidence == "centres":
            grids.setdefault((layout.grid, layout.geometry), []).append(key)
    for (grid, geometry), alike in grids.items():
        conv = PatchConv(grid, Grid(grid, geometry).placed(search.size), disjoint=False)
        small = math.prod(grid) <= SMALL
        alone = torch.eye(math.prod(grid), dtype=torch.bool, device="cpu")
        chosen = alone if small else _halves(grid)
        changed = torch.stack([middles_changed(ranked.base, conv, cells) for cells in chosen])
        after = search.ablated_model(changed, 4, sketch_size=FINE).sites
        for key in alike:
            layout, before = search.sites[key].layout, ranked.seen.sites[key].v
            mosaic = next((m for m in search.mosaics if m.conv.grid == grid and key in m.changes), None)
            if layout is None or key not in after or after[key].v.shape[1:] != before.shape[1:]:
                continue
            patches = list(layout.patches)
            change = relative_change(after[key].v, before[:1]) / relative_change(before[1], before[0])
            change = change[:, patches].cpu()
            if (small and _change_together(change.T)) or (
                not small
                and mosaic is not None
                and _some_share_cells(change, mosaic.changes[key][..., patches].cpu(), mosaic.codes, grid)
            ):
                reasons[key] = (
                    "two of its keys change about as much with one another's patch as with their own, so that which of "
                    "them is which patch is not known"
                )
    return search.refusing(reasons)


def _change_together(change: Tensor) -> bool:
    """Check whether two tokens change with one another's cells, and others do so much less.

    Args:
        change: (T, T) changes of each token, in order of their cells, with the middle of each cell.
    """
    with_others = change / change.diagonal()[:, None].clamp_min(1e-30)
    mutual = torch.minimum(with_others, with_others.T).fill_diagonal_(0).amax(1)
    return float(mutual.max()) > max(0.3, 1.9 * float(mutual.quantile(0.25)))


def _halves(grid: Cells) -> Tensor:
    """Return (halves, N) bool: every second cell as on a chessboard, and every second row, for cells at a corner."""
    lines = Grid(grid).lines
    return torch.stack([lines.sum(0), lines[0]][: len(grid)]) % 2 == 0


def _some_share_cells(change: Tensor, changes: Tensor, codes: Sequence[tuple[int, ...]], grid: Cells) -> bool:
    """Check whether two neighbouring tokens depend on the same two cells.

    Args:
        change: (halves, T) changes of the tokens, in order of their cells, with the middles of the cells of each half.
        changes: (M, M, T) changes of the tokens between the M images of the mosaics.
        codes: For each cell, the picture that it shows in each image of the mosaics.
        grid: Number of cells on each axis.
    """
    lines = Grid(grid).lines  # (axes, cells)
    for moved, half in zip(change, _halves(grid), strict=True):
        expected, usual = float(moved[half].median()), float(moved[~half].median())
        if usual > expected / 5:
            continue
        for cell in (~half & (moved > max(expected / 6, 2 * usual))).nonzero().flatten().tolist():
            beside = ((lines - lines[:, cell, None]).abs().amax(0) == 1).nonzero().flatten().tolist()
            if any(_prefer_own_cells(changes, codes, cell, other) < 1.25 for other in beside):
                return True
    return False


def _prefer_own_cells(changes: Tensor, codes: Sequence[tuple[int, ...]], one: int, other: int) -> float:
    """Return the log-ratio of how two tokens change in the mosaics with their own cell alone and with the other's."""
    code = torch.tensor(codes, device="cpu")[[one, other]]
    differs = code[:, :, None] != code[:, None]
    alone = [differs[0] & ~differs[1], differs[1] & ~differs[0]]  # images between which one of the two cells changes
    power = [[changes[..., t][i].square().mean().clamp_min(1e-16).log() for i in alone] for t in (one, other)]
    return float(power[0][0] - power[0][1] + power[1][1] - power[1][0]) / 2
