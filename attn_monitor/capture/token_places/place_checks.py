"""Checks that places hold: on the user's own images, for all of each patch, and for keys that are no patch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_monitor.capture.observation import SiteKey
from attn_monitor.capture.patch_grids import PatchConv
from attn_monitor.capture.token_places.decoding import share_of_wrong_weight, shares
from attn_monitor.capture.token_places.layout import SEVERAL, TokenLayout, is_whole, mostly_single
from attn_monitor.capture.token_places.random_projections import relative_change
from attn_monitor.capture.token_places.site_places import Mosaic, PlaceSearch
from attn_monitor.capture.token_places.synthetic_images import (
    border_changed,
    cell_weighted_noise,
    corners_changed,
    noise_images,
    quarters_changed,
    quarters_of_cells,
)
from attn_monitor.capture.token_places.tokens import SiteTokens
from attn_monitor.grid_geometry import GridGeometry, placed


def check_on_user_images(search: PlaceSearch, images: Sequence[Tensor], strength: float) -> None:
    """The same places must hold on images of the user's, each in another call and another random state."""
    for mosaic in search.mosaics:
        keys = [key for key, _, layout in search.placed() if search.mosaic_of(layout) is mosaic]
        for number, image in enumerate(images if keys else ()):
            seen = search.silent_model(cell_weighted_noise(image, mosaic.conv, strength), 2 + number).sites
            for key in keys:
                site = search.sites[key]
                if key not in seen or seen[key].v.shape[1] != len(mosaic.v[key]):
                    site.refuse("it runs with other shapes on the images given than on images that are made up")
                elif site.layout is not None and _holds_other_patches(seen[key], key, mosaic):
                    site.refuse("its tokens hold other patches on another image, or in another call")


def _holds_other_patches(seen: SiteTokens, key: SiteKey, mosaic: Mosaic) -> bool:
    compared = [(seen.v, mosaic.v[key])]
    if seen.q is not None and is_whole(mosaic.q.get(key), mosaic.cells):
        compared.append((seen.q, mosaic.q[key]))
    slack = 0.25 if seen.dtype in (torch.float16, torch.bfloat16) else 0.1  # of weights from 0 to 1
    return any(
        share_of_wrong_weight(shares(sketches, seen.threshold / 4)[0], places, mosaic.cells, slack) > 0.02
        for sketches, places in compared
    )


def refuse_partial_views(search: PlaceSearch) -> None:
    """Coarse tokens, and tokens whose fields overlap, must see all of their cell and all of the image's border."""
    finest, base = max(m.cells for m in search.mosaics), noise_images(search.images, 1, seed=4)[0]
    doubtful: dict[tuple[tuple[int, int], GridGeometry | None], list[tuple[SiteKey, TokenLayout]]] = {}
    for key, _, layout in search.placed():
        if layout.evidence == "centres" or math.prod(layout.grid) < finest:
            doubtful.setdefault((layout.grid, layout.geometry), []).append((key, layout))
    for (grid, geometry), keys in doubtful.items():
        conv = PatchConv(grid, placed(geometry, grid, search.size), disjoint=False)
        quarters, cells = quarters_of_cells(conv, search.size), conv.cell_of_pixels(search.size)
        there = torch.stack([cells[quarters == q].bincount(minlength=math.prod(grid)) > 0 for q in range(4)])
        changed = [border_changed(base, conv)[None], quarters_changed(base, quarters)]
        seen = search.silent_model(torch.cat([base[None], *changed]), 3).sites
        for key, layout in keys:
            moved = _moved(seen[key])[:, list(layout.patches)].cpu()
            border = torch.ones(grid, dtype=torch.bool)
            border[1:-1, 1:-1] = False
            if not bool(moved[0][border.flatten()].all()):
                search.sites[key].refuse(
                    "its keys do not change with the outermost pixels of the image, so a part of it is not looked at"
                )
            elif not bool((moved[1:] | ~there).all()):
                search.sites[key].refuse("some of its keys do not change with all parts of their patch")


def refuse_overlaps(search: PlaceSearch) -> None:
    """A key that is no patch and yet depends on the image holds all of it: else it is a patch of a finer grid."""
    doubtful: dict[SiteKey, list[int]] = {}
    for key, _, layout in search.placed():
        mosaic = search.mosaic_of(layout)
        places = () if mosaic is None else mosaic.v.get(key, ())
        if SEVERAL in places and mostly_single(places):
            doubtful[key] = [t for t, p in enumerate(places) if p == SEVERAL]
    if not doubtful:
        return
    base = noise_images(search.images, 1, seed=4)[0]
    seen = search.silent_model(torch.cat([base[None], corners_changed(base)]), 3).sites
    for key, tokens in doubtful.items():
        if not bool(_moved(seen[key])[:, tokens].all()):
            search.sites[key].refuse("some of its keys hold parts of several patches of the grid that the others form")


def _moved(seen: SiteTokens) -> Tensor:
    """Which tokens change between the first image and each of the others, however little: (B - 1, T)."""
    return relative_change(seen.v[1:], seen.v[:1]) > seen.threshold / 4
