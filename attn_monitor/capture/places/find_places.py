"""Which key and which query of each attention operation is which patch, asked of the model at every depth.

A few forwards with silenced attention (`silence`) on made-up images (`layout`), each asked once for a model, an image
size and a precision. A place is what a token holds of the image, whatever it is called and wherever it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from attn_monitor.capture.forward import Forward
from attn_monitor.capture.observer import SiteKey
from attn_monitor.capture.places import layout as lay
from attn_monitor.capture.places.centres import (
    check_on_user_images,
    rank_centres,
    refuse_overlaps,
    refuse_partial_views,
)
from attn_monitor.capture.places.layout import PatchConv
from attn_monitor.capture.places.mosaics import ask_mosaics, what_keys_are
from attn_monitor.capture.places.output_places import check_landing, refuse_mixtures
from attn_monitor.capture.places.query_places import find_cls, find_queries
from attn_monitor.capture.places.silent_forward import HowToRead
from attn_monitor.capture.places.silent_runs import Asker
from attn_monitor.capture.places.site_places import SitePlaces


def find_places(
    model: nn.Module,
    images: Tensor,
    forward: Forward,
    how: Mapping[SiteKey, HowToRead],
    moving: int,
    keys: int,
    convs: Sequence[PatchConv],
    piece: int,
) -> dict[SiteKey, SitePlaces]:
    """Places of keys and queries at the sites that ``how`` says how to read.

    Of the first of them, ``moving`` of its ``keys`` depend on the image. One of the user's images is asked about too.
    """
    around = {path for key in how for path in _ancestors(key[0])}
    ask = Asker(model, forward, how, around & dict(model.named_modules()).keys(), piece)
    found = {key: SitePlaces() for key in how}
    size = (images.shape[-2], images.shape[-1])
    grids = [*lay.candidate_grids(size, keys, moving, convs)]
    # Where the first attention is coarser than the patches, these tell whether its heads see the same of them.
    grids = [*(c for c in convs if c.disjoint and lay.is_covering(c, size) and math.prod(c.grid) > keys), *grids]
    mosaics, reference = ask_mosaics(ask, images, found, grids, convs)
    if not mosaics:
        return found
    strength = max(lay.little(site.dtype) for site in reference.sites.values())
    chosen = _least_alike(images)
    check_on_user_images(ask, chosen, strength, found, mosaics)
    unplaced = [k for k, f in found.items() if f.layout is None and not f.why and k in reference.sites]
    if unplaced:
        rank_centres(ask, images, chosen[0], strength, found, unplaced, mosaics, convs)
    refuse_partial_views(ask, images, found, mosaics)
    refuse_overlaps(ask, images, found, mosaics)
    find_queries(found, mosaics, reference)
    find_cls(ask, images, found, mosaics, reference)
    refuse_mixtures(found, reference)
    check_landing(ask, images, found, mosaics, reference)
    for key, places in found.items():
        if places.layout is None and not places.why:
            places.why = what_keys_are(key, mosaics)
    return found


def _ancestors(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _least_alike(images: Tensor) -> list[Tensor]:
    """The brightest and the darkest of the user's images; noise where all show one colour only."""
    lively = images[images.flatten(1).float().std(1, correction=0) > 1e-3]
    if not len(lively):
        return [lay.noise_images(images, 1, seed=3)[0]]
    brightness = lively.flatten(1).float().mean(1)
    return [lively[i] for i in dict.fromkeys([int(brightness.argmax()), int(brightness.argmin())])]
