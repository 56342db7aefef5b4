"""Decode from tokens, seen in the `synthetic_images`, which part of the image each one holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_monitor.capture.patch_grids import PatchConv
from attn_monitor.capture.token_places.layout import SEVERAL, STATIC, Places
from attn_monitor.capture.token_places.random_projections import relative_change
from attn_monitor.capture.token_places.synthetic_images import cell_weights


def places_in_mosaics(sketches: Tensor, codes: Sequence[tuple[int, ...]], limit: float) -> Places:
    """The cell that each token spells out, from sketches (M, T, S) of the tokens in `mosaics` of the cells' codes."""
    change = relative_change(sketches[:, None], sketches[None])  # (M, M, T)
    labels = (change > limit).long().cumprod(1).sum(1).T.tolist()  # the first image that each one is equal to
    known = {code: cell for cell, code in enumerate(codes)}
    places = []
    for token in labels:
        classes = {first: number for number, first in enumerate(dict.fromkeys(token))}
        code = tuple(classes[first] for first in token)
        places.append(STATIC if len(classes) == 1 else known.get(code, SEVERAL))
    return tuple(places)


def shares(sketches: Tensor, limit: float) -> Tensor:
    """How much of the whole change each token keeps when it is scaled: (n, ..., T) of (2 + n, ..., T, S) sketches.

    The change under a scale, projected on the whole change, is the scale where the token looks: a mean over what it
    holds. NaN where nothing moves.
    """
    base, whole, *scaled = sketches.double().unbind(0)
    change = whole - base
    energy, moved = change.square().sum(-1).clamp_min(1e-60), relative_change(whole, base) > limit
    return torch.stack([torch.where(moved, ((s - base) * change).sum(-1) / energy, math.nan) for s in scaled])


def centres(sketches: Tensor, conv: PatchConv, size: tuple[int, int], limit: float) -> Tensor:
    """(row, column) of the centre of what each token holds, in cells: (2, ..., T) of (4, ..., T, S) from `ramps`."""
    share = shares(sketches, limit)
    pixels, origin, cell = (
        torch.tensor(values).to(share).reshape(2, *(1 for _ in share.shape[1:]))
        for values in (size, conv.geometry.origin, conv.geometry.cell)
    )
    return (share * pixels - origin) / cell - 0.5


def cells_by_rank(centre: Tensor, grid: tuple[int, int]) -> Tensor:
    """(T,) cells of the rows and the columns into which (2, T) centres are ranked."""
    gh, gw = grid
    rows, cols = (ranked.argsort().argsort() // size for ranked, size in zip(centre, (gw, gh), strict=True))
    cells: Tensor = rows * gw + cols
    return cells


def places_by_centre(centre: Tensor, grid: tuple[int, int]) -> Places | None:
    """Rank the (2, T) centres into rows and columns; None where they are not one token for each cell of the grid."""
    (gh, gw), live = grid, ~centre.isnan().any(0)
    if int(live.sum()) != gh * gw:
        return None
    cell = cells_by_rank(centre[:, live], grid)
    ranks, cells = torch.stack([cell // gw, cell % gw]), cell.tolist()
    slack = torch.tensor([0.9 + 0.03 * gh, 0.9 + 0.03 * gw], device=centre.device)  # borders are drawn inwards
    if bool(((centre[:, live] - ranks).abs() > slack[:, None]).any()) or sorted(cells) != list(range(gh * gw)):
        return None
    found = iter(cells)
    return tuple(next(found) if alive else STATIC for alive in live.tolist())


def share_of_wrong_weight(share: Tensor, places: Places, cells: int, slack: float) -> float:
    """Share of the placed tokens without the weight of their cell, from (T,) `shares` of `cell_weighted_noise`."""
    tokens = [t for t, p in enumerate(places) if p >= 0]
    expected = cell_weights(cells).to(share)[[places[t] for t in tokens]]
    return _share_above((share[tokens] - expected).abs(), slack)


def share_far_from(centre: Tensor, places: Places, grid: tuple[int, int], slack: float) -> float:
    """Share of the placed tokens whose (2, T) centre is more than ``slack`` cells away from their place."""
    tokens = [t for t, p in enumerate(places) if p >= 0]
    cells = torch.tensor([places[t] for t in tokens], device=centre.device)
    expected = torch.stack([cells // grid[1], cells % grid[1]])
    return _share_above((centre[:, tokens] - expected).abs().amax(0), slack)


def _share_above(differences: Tensor, slack: float) -> float:
    """Of the differences that are known."""
    known = differences[~differences.isnan()]
    return float((known > slack).double().mean()) if len(known) else 0.0
