"""Refuse ranks by centres where two tokens share one centre, which noise alone would tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv
from attn_monitor.capture.observe.random_projections import FINE, relative_change
from attn_monitor.capture.token_places.centres import Ranked
from attn_monitor.capture.token_places.site_places import PlaceSearch
from attn_monitor.capture.token_places.synthetic_images import middles_changed
from attn_monitor.grid import Grid, GridGeometry

Cells = tuple[int, ...]


def refuse_shared_cells(search: PlaceSearch, ranked: Ranked) -> PlaceSearch:
    """Refuse sites where two tokens depend on the same two cells: they share one centre and are ranked by chance.

    Other noise in the middles of every second cell changes such a token although its own cell stays the same, and in
    the mosaics both tokens change as much with the one cell as with the other. Where most tokens change like this,
    their fields overlap too much for this test, and the site is kept.
    """
    reasons: dict[SiteKey, str] = {}
    grids: dict[tuple[Cells, GridGeometry | None], list[SiteKey]] = {}
    for key in ranked.keys:
        layout = search.sites[key].layout
        if layout is not None and layout.evidence == "centres" and len(layout.patches) > 4:
            grids.setdefault((layout.grid, layout.geometry), []).append(key)
    for (grid, geometry), alike in grids.items():
        conv = PatchConv(grid, Grid(grid, geometry).placed(search.size), disjoint=False)
        after = search.ablated_model(middles_changed(ranked.base, conv)[None], 4, sketch_size=FINE).sites
        for key in alike:
            layout, before = search.sites[key].layout, ranked.seen.sites[key].v
            mosaic = next((m for m in search.mosaics if m.conv.grid == grid and key in m.changes), None)
            if layout is None or mosaic is None or key not in after or after[key].v.shape[1:] != before.shape[1:]:
                continue
            patches = list(layout.patches)
            change = relative_change(after[key].v[0], before[0]) / relative_change(before[1], before[0])
            if _some_share_cells(change[patches].cpu(), mosaic.changes[key][..., patches].cpu(), mosaic.codes, grid):
                reasons[key] = (
                    "two of its keys change about as much with one another's patch as with their own, so that which of "
                    "them is which patch is not known"
                )
    return search.refusing(reasons)


def _some_share_cells(change: Tensor, changes: Tensor, codes: Sequence[tuple[int, ...]], grid: Cells) -> bool:
    """Check whether two neighbouring tokens depend on the same two cells.

    Args:
        change: (T,) changes of the tokens, in order of their cells, with the middles of every second cell.
        changes: (M, M, T) changes of the tokens between the M images of the mosaics.
        codes: For each cell, the picture that it shows in each image of the mosaics.
        grid: Number of cells on each axis.
    """
    lines = Grid(grid).lines  # (axes, cells)
    changed = lines.sum(0) % 2 == 0
    expected, usual = float(change[changed].median()), float(change[~changed].median())
    if usual > expected / 5:
        return False
    for cell in (~changed & (change > max(expected / 6, 2 * usual))).nonzero().flatten().tolist():
        beside = ((lines - lines[:, cell, None]).abs().sum(0) == 1).nonzero().flatten().tolist()
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
