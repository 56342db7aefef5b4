"""Find which query is which patch where keys are pooled and queries are not, as in PVT and Segformer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.decoding import centres, places_by_centre, share_far_from
from attn_monitor.capture.token_places.layout import STATIC, Places, is_whole
from attn_monitor.capture.token_places.site_places import PlaceSearch
from attn_monitor.capture.token_places.tokens import SiteTokens
from attn_monitor.grid import Grid

Cells = tuple[int, ...]
FinerQueries = tuple[dict[int, int], Cells | None]
"""The query of each cell of a grid, and that grid; empty and None where it was not found."""


def in_mosaics(search: PlaceSearch, key: SiteKey) -> FinerQueries:
    """Return the queries of a site that hold each one cell of a finer grid than the keys', by its mosaics."""
    layout = search.sites[key].layout
    coarse = 0 if layout is None else math.prod(layout.grid)
    for mosaic in search.mosaics:
        places = mosaic.q.get(key)
        if mosaic.geometry is None and mosaic.cells > coarse and places and is_whole(places, mosaic.cells):
            return {p: t for t, p in enumerate(places) if p >= 0}, mosaic.conv.grid
    return {}, None


def by_centre(
    halves: Sequence[Sequence[SiteTokens]], keys: int, convs: Sequence[PatchConv], size: Cells, limit: float
) -> FinerQueries:
    """Return the queries of a site by the centres of what they hold, as cells of a convolution with as many cells.

    Both halves of the base images must give one order, or nearly that of the queries, row by row.

    Args:
        halves: The site's tokens in `ramps` of the user's image and of noise, for each round.
        keys: Number of keys that are patches.
        convs: Convolutions that could be a patch embedding.
        size: Number of pixels on each axis of the image.
        limit: Relative change above which a token counts as changed.
    """
    queries = [[tokens.q for tokens in half] for half in halves]
    first = queries[0][0]
    if first is None or any(q is None for half in queries for q in half):
        return {}, None
    moving = (relative_change(first[1], first[0]) > limit).tolist()
    if sum(moving) <= keys:
        return {}, None
    for grid in dict.fromkeys(conv.grid for conv in convs if math.prod(conv.grid) == sum(moving)):
        conv = PatchConv(grid, Grid(grid).placed(size), disjoint=False)  # over the whole image, as the keys' grid is
        found = [
            torch.stack([centres(q, conv, size, limit) for q in half if q is not None]).nanmean(0) for half in queries
        ]
        cells = iter(range(sum(moving)))
        in_order = tuple(next(cells) if moves else STATIC for moves in moving)
        one, other = (places_by_centre(half, conv.grid) for half in found)
        places = one if one == other else None
        if places is None and all(_are_near(half, in_order, conv.grid) for half in found):
            places = in_order
        if places is not None:
            return {p: t for t, p in enumerate(places) if p >= 0}, conv.grid
    return {}, None


def _are_near(centre: Tensor, places: Places, grid: Cells) -> bool:
    """Check whether (axes, T) centres lie by their cells, but for the half cell by which padding moves all of them."""
    tokens = [t for t, p in enumerate(places) if p >= 0]
    off = (centre[:, tokens] - Grid(grid).lines.to(centre)).nanmedian(1, keepdim=True).values
    return float(off.abs().amax()) <= 0.75 and share_far_from(centre - off, places, grid, 0.9) <= 0.02
