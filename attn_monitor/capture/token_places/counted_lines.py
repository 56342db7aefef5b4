"""Find the number of cells on each axis by how many tokens change with the first line of pixels on it.

A patch embedding without a convolution tells nothing of its grid: 64 tokens may be 8 × 8, 4 × 16 or 2 × 32 patches of
an image, or 4 × 4 × 4 of a clip. With the first row of pixels, the tokens of one row of patches change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from attn_monitor.capture.observe.patch_grids import PatchConv
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.layout import STATIC
from attn_monitor.capture.token_places.site_places import PlaceSearch
from attn_monitor.capture.token_places.synthetic_images import first_lines_changed, noise_images
from attn_monitor.grid import Grid

_POOLED = 3  # tokens that may depend on the whole image, such as a mean


def counted_grids(search: PlaceSearch) -> list[PatchConv]:
    """Return the grids that the tokens of unplaced sites form, where no convolution gives them."""
    of_convs = {math.prod(conv.grid) for conv in search.convs}
    unplaced = [
        key
        for key in search.reference.sites
        if search.sites[key].layout is None
        and not search.sites[key].reason
        and of_convs.isdisjoint(sum(p != STATIC for p in m.v[key]) for m in search.mosaics if key in m.v)
    ]
    told = len(search.size) < 3 and any(conv.on_pixels for conv in search.convs)  # tokens are its cells, or merged
    if told or not unplaced:
        return []
    base = noise_images(search.images, 1, seed=7)[0]
    changed = torch.cat([base[None], noise_images(search.images, 1, seed=9), first_lines_changed(base)])
    seen = search.ablated_model(changed, 1).sites
    grids: dict[tuple[int, ...], None] = {}
    for key in unplaced:
        if key in seen:
            v, limit = seen[key].v, seen[key].threshold / 4
            moving, *counts = (relative_change(v[1:], v[:1]) > limit).sum(1).tolist()
            grids |= dict.fromkeys(_grids(moving, counts))
    return [PatchConv(grid, Grid(grid).placed(search.size), disjoint=False) for grid in grids]


def _grids(moving: int, counts: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield the grids in which ``counts`` of ``moving`` tokens lie in the first line of each axis.

    Some tokens may depend on the whole image, and are in every line. Several tokens may lie at each place.
    """
    for pooled in range(_POOLED + 1):
        cells, lines = moving - pooled, [count - pooled for count in counts]
        if cells > 0 and all(line > 0 and cells % line == 0 for line in lines):
            grid = tuple(cells // line for line in lines)
            if cells % math.prod(grid) == 0:
                yield grid
