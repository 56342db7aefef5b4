"""Exact places: each key and query that changes with one cell of the image and with no other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from attn_monitor.capture.observer import SiteKey
from attn_monitor.capture.places import layout as lay
from attn_monitor.capture.places.layout import PatchConv
from attn_monitor.capture.places.silent_forward import Tokens
from attn_monitor.capture.places.silent_runs import Asker
from attn_monitor.capture.places.site_places import Mosaic, SitePlaces, limit_of

_MOST_GRIDS = 6  # a pyramid has four, and one more when a guess is wrong


def ask_mosaics(
    ask: Asker,
    images: Tensor,
    found: dict[SiteKey, SitePlaces],
    waiting: list[PatchConv],
    convs: Sequence[PatchConv],
) -> tuple[list[Mosaic], Tokens]:
    """Exact places on every grid that tokens could be; and the tokens of the first mosaics' first image."""
    mosaics: list[Mosaic] = []
    reference = Tokens()
    size = (images.shape[-2], images.shape[-1])
    while waiting and len(mosaics) < _MOST_GRIDS:
        conv = waiting.pop(0)
        if any(m.conv.grid == conv.grid for m in mosaics):
            continue
        tokens = ask(lay.mosaics(images, conv), 1, by_head=math.prod(conv.grid))
        mosaic = _read(tokens, conv)
        mosaics.append(mosaic)
        reference = reference if reference.sites else tokens
        for key, places in mosaic.v.items():
            site = found[key]
            if site.layout is not None or site.why:
                continue
            site.layout = lay.layout_of(places, conv.grid, "exact")
            k = mosaic.k.get(key)
            if site.layout is None:
                continue
            if k is not None and lay.is_whole(k, mosaic.cells) and k != places:
                site.layout, site.why = None, "its keys and its values hold different patches"
            elif any(key in m.dilated for m in mosaics):
                site.layout, site.why = None, "its heads see different parts of each patch (dilated attention)"
        moving = {
            (len(places), sum(p != lay.STATIC for p in places))
            for key, places in mosaic.v.items()
            if found[key].layout is None and not found[key].why
        }
        waiting += [
            c for keys, live in sorted(moving, reverse=True) for c in lay.candidate_grids(size, keys, live, convs)
        ]
    return mosaics, reference


def _read(tokens: Tokens, conv: PatchConv) -> Mosaic:
    mosaic, cells = Mosaic(conv), math.prod(conv.grid)
    limits = []
    for key, site in tokens.sites.items():
        limits.append(limit_of(site))
        for name in ("v", "q", "k"):
            sketches = getattr(site, name)
            if sketches is not None:
                getattr(mosaic, name)[key] = lay.read_places(sketches, cells, limits[-1])
        if not lay.is_whole(mosaic.v[key], cells):
            mosaic.apart[key] = lay.changes(site.v[:, None], site.v[None])
        if site.heads is not None:
            heads = {lay.read_places(site.heads[:, h], cells, limits[-1]) for h in range(site.heads.shape[1])}
            if len(heads) > 1 and any(p >= 0 for places in heads for p in places):
                mosaic.dilated.add(key)
    limit = max(limits, default=1e-3)
    mosaic.entries = {call: lay.read_places(t, cells, limit) for call, t in tokens.entries.items()}
    mosaic.exits = {call: lay.read_places(t, cells, limit) for call, t in tokens.exits.items()}
    return mosaic


def what_keys_are(key: SiteKey, mosaics: Sequence[Mosaic]) -> str:
    """Why a site's keys have no places, in words."""
    seen = [m for m in mosaics if key in m.v]
    if not seen:
        return "its operation did not run in the same way on other images"
    places = seen[0].v[key]
    moving = [p for p in places if p != lay.STATIC]
    if not moving:
        return "what it reads (V) does not depend on the image, so no key holds a part of it"
    if len(moving) == len(places) and all(p == lay.SEVERAL for p in places):
        return "each of its keys holds many parts of the image (channel or linear attention, or tokens mixed elsewhere)"
    distinct = len({p for p in moving if p >= 0})
    return (
        f"{len(moving)} of its {len(places)} keys hold parts of the image, and they are not the grid of its patches "
        f"(of {seen[0].cells} patches {distinct} stand alone in a key): a part of the image, patches left out, pooled "
        "tokens in no regular grid, or an order that changes from image to image"
    )
