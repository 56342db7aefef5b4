"""Verify an order of tokens by shifting the image: what one token held, the next one holds then.

Convolutions are the same everywhere. Where the image is shifted by one cell, the token of each cell changes with small
noise as the token of the cell before it did. That is asked of all directions of a change at once, and so tells tokens
apart whose fields are much larger than a cell, and whose centres lie too close together to be ranked. At the borders,
where the model pads, tokens follow less closely, and more noise is drawn until all of them are told apart.

If each token follows the one before it on each axis, the order is right: where n tokens lie in consecutive columns, and
there are n columns, each is in its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv, candidate_grids
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.decoding import centres
from attn_monitor.capture.token_places.known_order import lies_over_image, row_by_row
from attn_monitor.capture.token_places.layout import Places
from attn_monitor.capture.token_places.site_places import PlaceSearch
from attn_monitor.capture.token_places.synthetic_images import ramps
from attn_monitor.capture.token_places.tokens import SiteTokens, Tokens
from attn_monitor.grid import Grid

_CLEAR = 0.1  # by so much the mean cosine with the tokens around must be larger than that of any other token
_ALIKE = 0.15  # and at least so large
_HOPELESS = 0.3  # share of tokens that do not fit, above which no more noise is drawn
_DRAWS = 5
_SKETCH = 256  # numbers in a sketch: directions are compared, not lengths
_CHUNK = 256  # tokens that are compared at once


@dataclass(frozen=True)
class ShiftedOrder:
    """Hold the order of a site's tokens that shift with the image.

    Attributes:
        grid: Number of cells on each axis.
        places: The cell of each key.
        of_queries: Whether its queries shift in the same order.
    """

    grid: tuple[int, ...]
    places: Places
    of_queries: bool


def orders_that_shift(
    search: PlaceSearch, images: Sequence[tuple[Tensor, Tokens]], strength: float, seed: int, keys: Sequence[SiteKey]
) -> dict[SiteKey, ShiftedOrder]:
    """Return the order of the tokens of sites where it is row by row, or that of another site, and shifts.

    Args:
        search: The search.
        images: (C, *size) images, with the tokens in the `ramps` of each.
        strength: Standard deviation of the noise, relative to that of an image.
        seed: Seed of the forwards.
        keys: The sites.
    """
    by_conv: dict[PatchConv, dict[SiteKey, list[Places]]] = {}
    for key in keys:
        seen = [tokens.sites[key] for _, tokens in images if key in tokens.sites]
        for conv, orders in _orders(search, seen):
            by_conv.setdefault(conv, {})[key] = orders
    found: dict[SiteKey, ShiftedOrder] = {}
    for conv, possible in by_conv.items():
        cells = [round(cell) for cell in conv.geometry.cell]
        if any(abs(cell - pixels) > 1e-3 for cell, pixels in zip(conv.geometry.cell, cells, strict=True)):
            continue
        found |= _shifting(search, conv, cells, [image for image, _ in images], strength, seed, possible)
    return found


def _shifting(
    search: PlaceSearch,
    conv: PatchConv,
    cells: Sequence[int],
    images: Sequence[Tensor],
    strength: float,
    seed: int,
    possible: dict[SiteKey, list[Places]],
) -> dict[SiteKey, ShiftedOrder]:
    """Return which of the possible orders of sites on one grid shift, with noise until all tokens of a site fit."""
    found: dict[SiteKey, ShiftedOrder] = {}
    changes: dict[SiteKey, list[tuple[Tensor, Tensor | None]]] = {key: [] for key in possible}
    plain: list[tuple[Tensor, Mapping[SiteKey, SiteTokens]]] = []
    for run in range(_DRAWS * len(images)):
        draw, number = divmod(run, len(images))
        if not possible:
            break
        if draw == 0:
            shown = _shifted(images[number], cells, images[number])
            plain.append((shown, search.ablated_model(shown, seed, sketch_size=_SKETCH).sites))
        shown, before = plain[number]
        noise = ramps(images[number], strength, seed=10 + draw)[1] - images[number]
        noise = _without_last_lines(noise, cells)
        shown = shown + _shifted(noise, cells, torch.zeros_like(noise))
        after = search.ablated_model(shown, seed, sketch_size=_SKETCH).sites
        for key, orders in [*possible.items()]:
            if key not in after or key not in before or after[key].v.shape != before[key].v.shape:
                del possible[key]
                continue
            changes[key].append((after[key].v - before[key].v, _difference(after[key].q, before[key].q)))
            fits = [_fit([v for v, _ in changes[key]], len(plain), order, conv.grid) for order in orders]
            right = next((order for order, fit in zip(orders, fits, strict=True) if fit == 1), None)
            if right is not None and number + 1 == len(images):
                queries = [q for _, q in changes[key] if q is not None and q.shape[1] == len(right)]
                follow = len(queries) == len(changes[key]) and _fit(queries, len(plain), right, conv.grid) == 1
                found[key] = ShiftedOrder(conv.grid, right, follow)
            if key in found or max(fits) < 1 - _HOPELESS:
                del possible[key]
    return found


def _difference(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None or one.shape != other.shape else one - other


def _orders(search: PlaceSearch, seen: Sequence[SiteTokens]) -> list[tuple[PatchConv, list[Places]]]:
    """Return the first grid that has a cell for each token that changes, with the orders that may be those of a site.

    Args:
        search: The search.
        seen: Tokens of the site in the `ramps` of each image.
    """
    moving = torch.stack([relative_change(s.v[1], s.v[0]) > s.threshold / 4 for s in seen]).any(0)
    cells, limit = int(moving.sum()), seen[0].threshold / 4
    grids = candidate_grids(search.size, len(moving), cells, search.convs)
    conv = next((conv for conv in grids if math.prod(conv.grid) == cells > 1), None)
    if conv is None:
        return []
    halves = [centres(s.v, conv, search.size, limit) for s in seen]
    others = [o.places for _, _, o in search.placed() if o.grid == conv.grid and len(o.order) == len(moving)]
    known = [row_by_row(torch.stack(halves).nanmean(0), conv.grid), *others]
    orders = [p for p in dict.fromkeys(known) if p is not None and lies_over_image(halves, p, conv.grid)]
    return [(conv, orders)] if orders else []


def _shifted(image: Tensor, cells: Sequence[int], entering: Tensor) -> Tensor:
    """Return (1 + axes, C, *size): an image, then shifted by one cell on each axis, with the first line of another."""
    shown = [image]
    for axis, pixels in enumerate(cells, 1):
        kept = image.shape[axis] - pixels
        shown.append(torch.cat([entering.narrow(axis, 0, pixels), image.narrow(axis, 0, kept)], axis))
    return torch.stack(shown)


def _without_last_lines(noise: Tensor, cells: Sequence[int]) -> Tensor:
    """Return noise without the last line of cells on each axis, which a shift moves out of the image.

    So noise is lost nowhere, and what a model pads holds none, as the line that enters.
    """
    noise = noise.clone()
    for axis, pixels in enumerate(cells, 1):
        if noise.shape[axis] >= 2 * pixels:  # of a single line, nothing is compared
            noise.narrow(axis, noise.shape[axis] - pixels, pixels).zero_()
    return noise


def _fit(changes: Sequence[Tensor], images: int, places: Places, grid: Sequence[int]) -> float:
    """Return the share of tokens that change as the one before did before the shift; 0 where lines of them do not.

    Each image must show the order, and all of them together clearly.

    Args:
        changes: For each noise and image, (1 + axes, T, S) changes of the tokens in it and its `_shifted` versions.
        images: Number of images, which take turns.
        places: The cell of each token, in the order to check; one token for each cell.
        grid: Number of cells on each axis.
    """
    tokens = sorted((token for token, place in enumerate(places) if place >= 0), key=lambda token: places[token])
    share = 1.0
    for some, clear in ((changes, _CLEAR), *((changes[n::images], 0.0) for n in range(images))):
        # Side by side, a product of two of them is the sum over all noise.
        first, *moved = (torch.cat([_directions(c[n, tokens]) for c in some], -1) for n in range(1 + len(grid)))
        first = first / len(some)
        follow = _lines_follow(first, moved, grid, clear)
        share = min(share, _share_that_follow(first, moved, grid, clear) if follow else 0.0)
    return share


def _lines_follow(first: Tensor, moved: Sequence[Tensor], grid: Sequence[int], clear: float) -> bool:
    """Check for each line of an axis that it follows the line before it, on average over its tokens, and no other."""
    for axis, (of_axis, count) in enumerate(zip(moved, grid, strict=True)):
        if count > 1:
            one, other = (x.unflatten(0, tuple(grid)).movedim(axis, 0).flatten(1, -2) for x in (of_axis, first))
            alike = torch.einsum("ans,bns->ab", one, other)[1:] / one.shape[1]
            if not bool(_fitting(alike, torch.arange(count - 1), torch.ones(count - 1), clear).all()):
                return False
    return True


def _share_that_follow(first: Tensor, moved: Sequence[Tensor], grid: Sequence[int], clear: float) -> float:
    """Return the share of places of which the token fits to those beside it on all axes, and no other token does."""
    places, fitting = torch.arange(math.prod(grid)), 0
    for some in places.split(_CHUNK):
        alike, beside = torch.zeros(len(some), len(places), dtype=first.dtype), torch.zeros(len(some))
        for axis, of_axis in enumerate(moved):
            step, line = math.prod(grid[axis + 1 :]), Grid(grid).lines[axis][some]
            earlier, later = line > 0, line < grid[axis] - 1
            alike += torch.where(earlier[:, None], first[(some - step).clamp_min(0)] @ of_axis.T, 0)
            alike += torch.where(later[:, None], of_axis[(some + step).clamp_max(len(places) - 1)] @ first.T, 0)
            beside += earlier.int() + later.int()
        fitting += int(_fitting(alike, some, beside, clear).sum())
    return fitting / len(places)


def _fitting(alike: Tensor, own: Tensor, times: Tensor, clear: float) -> Tensor:
    """Return which rows are largest in their own column, by so many times ``clear``."""
    value = alike.gather(1, own[:, None])[:, 0]
    other = alike.scatter(1, own[:, None], -math.inf).amax(1)
    return (value > times * (_ALIKE if clear else 0)) & (value > other + times * clear)


def _directions(change: Tensor) -> Tensor:
    """Return (T, S) changes with length 1, without what all tokens have in common, such as a norm of the image."""
    own = change.double().cpu()
    own = own - own.mean(0)
    directions: Tensor = own / own.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return directions
