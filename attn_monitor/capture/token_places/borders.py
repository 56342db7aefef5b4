"""Locate patches that no convolution makes, by the first and last pixels that some rows and columns of them depend on.

A patch embedding that cuts its patches out and multiplies them has no stride to read. Where its patches do not tile
the image, mosaics fail and only the order of tokens is known, by their centres. Then a bisection finds the first pixel
that the second and the last row of patches depend on, and the last pixel of the first row, and the mosaics are run
again with that geometry. Of patches that overlap, cells are the middles, as of a convolution's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.layout import TokenLayout
from attn_monitor.capture.token_places.mosaics import read_mosaics
from attn_monitor.capture.token_places.site_places import PlaceSearch
from attn_monitor.capture.token_places.synthetic_images import noise_images
from attn_monitor.capture.token_places.tokens import SiteTokens
from attn_monitor.grid import GridGeometry

_SEED = 3


def place_by_borders(search: PlaceSearch, keys: Sequence[SiteKey]) -> tuple[PlaceSearch, bool]:
    """Measure the cells of sites that are only ordered so far, and repeat the mosaics.

    Returns:
        The search, and whether any site was measured.
    """
    ranked = {key: site.layout for key in keys if (site := search.sites[key]).layout is not None}
    if search.convs or not ranked:
        return search, False
    key, layout = next((k, o) for k, o in ranked.items() if o is not None)
    geometry = _measured(search, key, layout)
    if geometry is None:
        return search, False
    ordered = {k: search.sites[k] for k, o in ranked.items() if o is not None and o.grid == layout.grid}
    bare = {k: replace(site, layout=None, patch_queries={}, query_grid=None) for k, site in ordered.items()}
    found = read_mosaics(search.with_sites(bare), [PatchConv(layout.grid, geometry, disjoint=True)])
    again = [k for k in ordered if found.sites[k].layout is None and not found.sites[k].reason]
    layouts = {k: replace(o, geometry=geometry) for k in again if (o := ordered[k].layout) is not None}
    found = found.with_sites({k: replace(ordered[k], layout=o) for k, o in layouts.items()})
    return found, any(found.sites[k].layout is not None for k in ordered)


def _measured(search: PlaceSearch, key: SiteKey, layout: TokenLayout) -> GridGeometry | None:
    """Measure origin and size of the cells in pixels; return None where cells are unequal or tile the image."""
    if min(layout.grid) < 3:
        return None
    asked = [
        _Asked(axis, *line) for axis, n in enumerate(layout.grid) for line in ((1, True), (n - 1, True), (0, False))
    ]
    pixels = _outermost_pixels(search, key, layout, asked)
    origin, cell = [], []
    for axis, cells in enumerate(layout.grid):
        one, last, end = pixels[3 * axis : 3 * axis + 3]
        size, left = divmod(last - one, cells - 2)
        if left or size < 1:
            return None
        origin.append((one - size + end + 1 - size) / 2)  # the first patch is from one - size to end
        cell.append(float(size))
    return GridGeometry(tuple(origin), tuple(cell)).unless_whole(layout.grid, search.size)


class _Asked(NamedTuple):
    """Name the first or the last pixel on an axis that a line of patches on it depends on."""

    axis: int
    line: int
    first: bool


def _outermost_pixels(search: PlaceSearch, key: SiteKey, layout: TokenLayout, asked: Sequence[_Asked]) -> list[int]:
    """Return each pixel that is asked for."""
    one, other = noise_images(search.images, 2, seed=12)
    before = search.ablated_model(one[None], _SEED).sites[key]
    sizes = [search.size[pixel.axis] for pixel in asked]
    low, high = [0] * len(asked), list(sizes)  # the pixel is in low ... high - 1, counted from its end of the axis
    while any(b - a > 1 for a, b in zip(low, high, strict=True)):
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        images = torch.stack([_begun(one, other, pixel, count) for pixel, count in zip(asked, middle, strict=True)])
        after = search.ablated_model(images, _SEED).sites[key]
        moved = _moved(before, after)[:, list(layout.patches)].unflatten(1, layout.grid)
        for number, (axis, line, _) in enumerate(asked):
            if bool(moved[number].select(axis, line).any()):
                high[number] = middle[number]
            else:
                low[number] = middle[number]
    found = zip(low, asked, sizes, strict=True)
    return [pixel if first else size - 1 - pixel for pixel, (_, _, first), size in found]


def _begun(image: Tensor, other: Tensor, pixel: _Asked, count: int) -> Tensor:
    """Replace so many pixels of a (C, *size) image from one end of an axis by those of another image."""
    changed, dim = image.clone(), 1 + pixel.axis
    start = 0 if pixel.first else image.shape[dim] - count
    changed.narrow(dim, start, count).copy_(other.narrow(dim, start, count))
    return changed


def _moved(before: SiteTokens, after: SiteTokens) -> Tensor:
    return relative_change(after.v, before.v) > before.threshold / 4
