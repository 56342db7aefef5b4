"""Check assignments on the user's own images, for all parts of each patch, and for keys that are no patch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.decoding import share_of_wrong_weight, shares
from attn_monitor.capture.token_places.layout import SEVERAL, TokenLayout, is_whole, mostly_single
from attn_monitor.capture.token_places.site_places import Mosaic, PlaceSearch
from attn_monitor.capture.token_places.synthetic_images import (
    border_changed,
    cell_weighted_noise,
    corners_changed,
    mosaics,
    noise_images,
    quarters_changed,
    quarters_of_cells,
    thirds_changed,
)
from attn_monitor.capture.token_places.tokens import SiteTokens
from attn_monitor.grid import Grid, GridGeometry

_MOVED = 0.25  # least share of the patches that must change where noise is weak at the ends of the range
_OWN_LINE = 0.15  # least change with a patch's own third of the rows or columns, relative to any third


def check_on_user_images(search: PlaceSearch, images: Sequence[Tensor], strength: float) -> PlaceSearch:
    """Refuse sites with tokens that do not change by the weights of their cells on the user's images.

    Args:
        search: The search; its sites on the grid of a mosaic are checked.
        images: (C, *size) images, each run in a call and random state of its own.
        strength: Standard deviation of the noise, relative to that of the image.
    """
    reasons: dict[SiteKey, str] = {}
    # Models that round their images need more noise, and those that take a logarithm less of it near 0.
    ways = deque([(1, False), (3, False), (10, False), (5, True)])
    for mosaic in search.mosaics:
        keys = [key for key, _, layout in search.placed() if search.mosaic_of(layout) is mosaic]
        for number, image in enumerate(images if keys else ()):
            waiting = [key for key in keys if key not in reasons]
            for tried, (times, inside) in enumerate(tuple(ways)):
                if not waiting:
                    break
                ways.rotate(-min(tried, 1))  # the one that was right comes first the next time
                weighted = cell_weighted_noise(image, mosaic.conv, times * strength, inside=inside)
                seen = search.ablated_model(weighted, 2 + number).sites
                for key in waiting:
                    keys_here = seen[key].v.shape[1] if key in seen else 0
                    if keys_here != len(mosaic.v[key]):
                        reasons[key] = (
                            f"it ran on {len(mosaic.v[key])} keys on synthetic images, and on {keys_here} for "
                            "an image that was given"
                            if keys_here
                            else "it ran on synthetic images, and did not run for an image that was given"
                        )
                waiting = [k for k in waiting if k not in reasons and _holds_other_patches(seen[k], k, mosaic, inside)]
            for key in waiting:
                reasons[key] = (
                    "on an image that was given, its tokens do not change in proportion to small changes of the "
                    "patches that they hold on synthetic images, so that their places there are not known"
                )
    return search.refusing(reasons)


def _holds_other_patches(seen: SiteTokens, key: SiteKey, mosaic: Mosaic, inside: bool) -> bool:
    """Check for tokens that do not change by the weight of their cell; with noise ``inside``, some have to change."""
    compared = [(seen.v, mosaic.v[key])]
    if seen.q is not None and is_whole(mosaic.q.get(key), mosaic.cells):
        compared.append((seen.q, mosaic.q[key]))
    slack = 0.25 if seen.dtype in (torch.float16, torch.bfloat16) else 0.1  # weights are from 0 to 1
    for sketches, places in compared:
        share = shares(sketches, seen.threshold / 4)[0]
        moved = float(share[[t for t, p in enumerate(places) if p >= 0]].isfinite().double().mean())
        if (inside and moved < _MOVED) or share_of_wrong_weight(share, places, mosaic.cells, slack) > 0.02:
            return True
    return False


def depend_on_batch(search: PlaceSearch, keys: Sequence[SiteKey]) -> list[SiteKey]:
    """Return the sites with other values for an image alone than for the same image at either end of a batch."""
    seen, reference = set[SiteKey](), search.reference.sites
    shown, size = mosaics(search.images, search.mosaics[0].conv), search.ablated_model.batch_size
    for number in {1, min(size, len(shown) - 1)} if size > 1 and keys else ():  # the first one runs alone
        alone = search.ablated_model(shown[number : number + 1], 1).sites
        for key in keys:
            if key in alone and key in reference and alone[key].v.shape[1:] == reference[key].v.shape[1:]:
                change = relative_change(alone[key].v[0], reference[key].v[number])
                seen |= {key} if bool((change > alone[key].threshold).any()) else set()
    return [*seen]


def refuse_partial_views(search: PlaceSearch) -> PlaceSearch:
    """Refuse sites with coarse or overlapping tokens that miss a part of their cell, or of the image's border."""
    finest, base = max(m.cells for m in search.mosaics), noise_images(search.images, 1, seed=4)[0]
    reasons: dict[SiteKey, str] = {}
    doubtful: dict[tuple[tuple[int, ...], GridGeometry | None], list[tuple[SiteKey, TokenLayout]]] = {}
    for key, _, layout in search.placed():
        if layout.evidence == "centres" or math.prod(layout.grid) < finest:
            doubtful.setdefault((layout.grid, layout.geometry), []).append((key, layout))
    for (grid, geometry), keys in doubtful.items():
        conv = PatchConv(grid, Grid(grid, geometry).placed(search.size), disjoint=False)
        quarters, cells = quarters_of_cells(conv, search.size), conv.cell_of_pixels(search.size)
        there = torch.stack(
            [cells[quarters == q].bincount(minlength=math.prod(grid)) > 0 for q in range(2 ** len(grid))]
        )
        ranked = any(layout.evidence == "centres" for _, layout in keys)
        changed = [border_changed(base, conv)[None], quarters_changed(base, quarters)]
        changed += [thirds_changed(base, conv)] * ranked
        seen = search.ablated_model(torch.cat([base[None], *changed]), 3).sites
        for key, layout in keys:
            moved = _moved(seen[key])[:, list(layout.patches)].cpu()
            border = torch.ones(grid, dtype=torch.bool, device="cpu")
            border[(slice(1, -1),) * len(grid)] = False
            if not bool(moved[0][border.flatten()].all()):
                reasons[key] = (
                    "some of its keys at the border of the grid do not, or hardly, change with the image's outermost "
                    "pixels, so that a map laid over the whole image could be off"
                )
            elif not bool((moved[1 : 1 + len(there)] | ~there).all()):
                reasons[key] = "some of its keys do not change with all parts of their patch"
            elif layout.evidence == "centres" and _in_other_lines(seen[key], layout):
                reasons[key] = (
                    "the order of its keys is not known: some hardly change with the row or the column of patches "
                    "where the centre of what they hold seems to be"
                )
    return search.refusing(reasons)


def _in_other_lines(seen: SiteTokens, layout: TokenLayout) -> bool:
    """Check whether a patch hardly changes with its own third of the rows (columns, …), but with another third.

    This finds two tokens that were ranked in each other's place, where each depends mostly on one cell. Fields of
    several cells, as behind three convolutions, change with all thirds and pass.
    """
    lines = Grid(layout.grid).lines  # (axes, N)
    change = relative_change(seen.v[-3 * len(lines) :], seen.v[:1])[:, list(layout.patches)].cpu()
    change = change.unflatten(0, (-1, 3))  # (axes, 3, N)
    own = change.gather(1, (lines % 3)[:, None])[:, 0]
    return bool((own < _OWN_LINE * change.amax(1)).any())


def refuse_overlaps(search: PlaceSearch) -> PlaceSearch:
    """Refuse sites with a key that is no patch and depends on a part of the image only, as finer patches do."""
    doubtful: dict[SiteKey, list[int]] = {}
    for key, _, layout in search.placed():
        mosaic = search.mosaic_of(layout)
        places = () if mosaic is None else mosaic.v.get(key, ())
        if SEVERAL in places and mostly_single(places):
            doubtful[key] = [t for t, p in enumerate(places) if p == SEVERAL]
    if not doubtful:
        return search
    base = noise_images(search.images, 1, seed=4)[0]
    seen = search.ablated_model(torch.cat([base[None], corners_changed(base)]), 3).sites
    wrong = [key for key, tokens in doubtful.items() if not bool(_moved(seen[key])[:, tokens].all())]
    reason = "some of its keys hold parts of several patches of the grid that the others form"
    return search.refusing(dict.fromkeys(wrong, reason))


def _moved(seen: SiteTokens) -> Tensor:
    """Return as (B - 1, T) which tokens change between the first image and each of the others, however little."""
    return relative_change(seen.v[1:], seen.v[:1]) > seen.threshold / 4
