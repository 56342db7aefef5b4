"""Decode the part of the image that each token depends on, from its changes between `synthetic_images`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from attn_monitor.capture.observe.patch_grids import PatchConv
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.layout import SEVERAL, STATIC, Places
from attn_monitor.capture.token_places.synthetic_images import cell_weights
from attn_monitor.grid import Grid


def places_in_mosaics(sketches: Tensor, codes: Sequence[tuple[int, ...]], limit: float) -> Places:
    """Assign each token to the cell with the code that its changes between mosaics spell out.

    Args:
        sketches: (M, T, S) sketches of the tokens in the M images of `mosaics`.
        codes: For each cell, the picture that it shows in each of the M images.
        limit: Relative change above which a token counts as changed.

    Returns:
        The cell of each of the T tokens, or `STATIC`, or `SEVERAL`.
    """
    change = relative_change(sketches[:, None], sketches[None])  # (M, M, T)
    labels = (change > limit).long().cumprod(1).sum(1).T.tolist()  # the first image in which the token is the same
    known = {code: cell for cell, code in enumerate(codes)}
    places = []
    for token in labels:
        classes = {first: number for number, first in enumerate(dict.fromkeys(token))}
        code = tuple(classes[first] for first in token)
        places.append(STATIC if len(classes) == 1 else known.get(code, SEVERAL))
    return tuple(places)


def shares(sketches: Tensor, limit: float) -> Tensor:
    """Return the share of the whole change that each token keeps when the change of the image is scaled.

    The change under a scale, projected on the whole change, is the mean of the scale over what the token depends on.

    Args:
        sketches: (2 + n, ..., T, S) sketches in the base image, the changed image and n images with a scaled change.
        limit: Relative change above which a token counts as changed.

    Returns:
        (n, ..., T) shares, mostly from 0 to 1, NaN where a token does not change.
    """
    base, whole, *scaled = sketches.double().unbind(0)
    change = whole - base
    energy, moved = change.square().sum(-1).clamp_min(1e-60), relative_change(whole, base) > limit
    return torch.stack([torch.where(moved, ((s - base) * change).sum(-1) / energy, math.nan) for s in scaled])


def centres(sketches: Tensor, conv: PatchConv, size: Sequence[int], limit: float) -> Tensor:
    """Return the centre of what each token depends on.

    Args:
        sketches: (2 + axes, ..., T, S) sketches in the images of `ramps`.
        conv: Origin and size of the cells.
        size: Number of pixels on each axis of the image.
        limit: Relative change above which a token counts as changed.

    Returns:
        (axes, ..., T) position on each axis (row, column) in cells, whole numbers at the middle of a cell; NaN where a
        token does not change.
    """
    share = shares(sketches, limit)
    pixels, origin, cell = (
        torch.tensor(values, device="cpu").to(share).reshape(-1, *(1 for _ in share.shape[1:]))
        for values in (size, conv.geometry.origin, conv.geometry.cell)
    )
    return (share * pixels - origin) / cell - 0.5


def cells_by_rank(centre: Tensor, grid: Sequence[int]) -> Tensor:
    """Rank (axes, T) centres into the lines (rows, columns) of each axis, and return the (T,) cells."""
    cells, total = torch.zeros(centre.shape[1:], dtype=torch.int64, device=centre.device), math.prod(grid)
    for ranked, lines in zip(centre, grid, strict=True):
        cells = cells * lines + ranked.argsort().argsort() // (total // lines)
    return cells


def places_by_centre(centre: Tensor, grid: Sequence[int]) -> Places | None:
    """Assign tokens by their (axes, T) centres; return None unless there is one token for each cell, close to it."""
    live, total = ~centre.isnan().any(0), math.prod(grid)
    if int(live.sum()) != total:
        return None
    cell = cells_by_rank(centre[:, live], grid)
    cells: list[int] = cell.tolist()
    if sorted(cells) != list(range(total)):
        return None
    lines = Grid(grid).lines.to(cell.device)[:, cell]
    slack = torch.tensor([0.9 + 0.03 * count for count in grid], device=centre.device)  # at borders they lie inwards
    if bool(((centre[:, live] - lines).abs() > slack[:, None]).any()):
        return None
    found = iter(cells)
    return tuple(next(found) if alive else STATIC for alive in live.tolist())


def are_clear(halves: Sequence[Tensor], places: Places, grid: Sequence[int]) -> bool:
    """Return False where a few tokens have lines that lie closer than the halves differ, which agree by chance then."""
    tokens = [t for t, p in enumerate(places) if p >= 0]
    if len(tokens) > 9:
        return True
    at = Grid(grid).lines[:, [places[t] for t in tokens]].to(halves[0].device)
    one, other = (half[:, tokens] for half in halves)
    for centre, apart, line in zip((one + other) / 2, one - other, at, strict=True):
        lines = [centre[line == n] for n in range(int(line.max()) + 1)]
        gaps = [float(after.min() - before.max()) for before, after in pairwise(lines)]
        if min(gaps, default=math.inf) < float(apart.square().mean() / 2) ** 0.5:
            return False
    return True


def is_warped(centre: Tensor, places: Places, grid: Sequence[int]) -> bool:
    """Check whether (axes, T) centres are off their cells as by a warp: closer together in the middle of an axis.

    Large fields move all centres by up to half a cell, and the outermost ones inwards, so that they lie closer there.
    Fewer than six rows or columns are too few to tell.
    """
    tokens = [t for t, p in enumerate(places) if p >= 0]
    at = Grid(grid).lines[:, [places[t] for t in tokens]].to(centre.device)
    for positions, lines, count in zip(centre[:, tokens], at, grid, strict=True):
        if count < 6:
            continue
        middle = torch.stack([positions[lines == line].nanmedian() for line in range(count)]).cpu()
        spacing, third = middle.diff(), (count - 1) // 3
        ends = min(float(spacing[:third].mean()), float(spacing[-third:].mean()))
        off = float((middle - torch.arange(count, device="cpu")).abs().max())
        if off > 0.5 and ends > 1.15 * float(spacing[third:-third].mean()):
            return True
    return False


def share_of_wrong_weight(share: Tensor, places: Places, cells: int, slack: float) -> float:
    """Return the share of assigned tokens that do not change by the weight of their cell.

    Args:
        share: (T,) `shares` of the tokens in `cell_weighted_noise`.
        places: The cell of each token.
        cells: Number of cells.
        slack: Largest difference from the `cell_weights` that counts as equal.

    Returns:
        A number from 0 to 1; tokens that do not change are not counted.
    """
    tokens = [t for t, p in enumerate(places) if p >= 0]
    expected = cell_weights(cells).to(share)[[places[t] for t in tokens]]
    return _share_above((share[tokens] - expected).abs(), slack)


def share_far_from(centre: Tensor, places: Places, grid: Sequence[int], slack: float) -> float:
    """Return the share, 0 to 1, of assigned tokens with a (axes, T) centre more than ``slack`` cells off their cell."""
    tokens = [t for t, p in enumerate(places) if p >= 0]
    expected = Grid(grid).lines[:, [places[t] for t in tokens]].to(centre.device)
    return _share_above((centre[:, tokens] - expected).abs().amax(0), slack)


def _share_above(differences: Tensor, slack: float) -> float:
    """Return the share of differences above ``slack``, NaN left out."""
    known = differences[~differences.isnan()]
    return float((known > slack).double().mean()) if len(known) else 0.0
