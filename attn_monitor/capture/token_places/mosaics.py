"""Assign exactly each key and query that changes with one cell of the image and with no other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv, candidate_grids
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.decoding import places_in_mosaics
from attn_monitor.capture.token_places.layout import SEVERAL, STATIC, Places, is_whole, layout_of
from attn_monitor.capture.token_places.site_places import Mosaic, PlaceSearch, SitePlaces
from attn_monitor.capture.token_places.synthetic_images import mosaic_codes, mosaics
from attn_monitor.capture.token_places.tokens import Tokens

_MOST_GRIDS = 6  # a pyramid has four, and one more when a guess is wrong


def read_mosaics(search: PlaceSearch, grids: Sequence[PatchConv]) -> PlaceSearch:
    """Assign tokens exactly on every grid that they could form.

    The numbers of tokens that change give more grids to try, as the stages of a pyramid have different ones.
    """
    waiting = list(grids)
    while waiting and len(search.mosaics) < _MOST_GRIDS:
        conv = waiting.pop(0)
        if any(m.conv == conv for m in search.mosaics) or any(o.grid == conv.grid for _, _, o in search.placed()):
            continue
        tokens = search.ablated_model(mosaics(search.images, conv), 1, by_head=math.prod(conv.grid), first_alone=True)
        mosaic = _read(tokens, conv, search.size)
        reference = search.reference if search.reference.sites else tokens
        search = replace(search, mosaics=(*search.mosaics, mosaic), reference=reference)
        search = search.with_sites({key: _placed(search, mosaic, key, places) for key, places in mosaic.v.items()})
        moving = {
            (len(places), sum(p != STATIC for p in places))
            for key, places in mosaic.v.items()
            if search.sites[key].layout is None and not search.sites[key].reason
        }
        for keys, live in sorted(moving, reverse=True):
            waiting += candidate_grids(search.size, keys, live, search.convs)
    return search


def _placed(search: PlaceSearch, mosaic: Mosaic, key: SiteKey, places: Places) -> SitePlaces:
    """Return the site with the layout that a mosaic shows, or with the reason for having none."""
    site, k = search.sites[key], mosaic.k.get(key)
    layout = layout_of(places, mosaic.conv.grid, "exact", mosaic.geometry)
    if site.layout is not None or site.reason or layout is None:
        return site
    if k is not None and is_whole(k, mosaic.cells) and k != places:
        return replace(site, reason="its keys and its values hold different patches")
    if any(key in m.dilated for m in search.mosaics):
        reason = "its heads read different parts of each patch, so a key holds no one part for all of them"
        return replace(site, reason=reason)
    return replace(site, layout=layout, held=mosaic.held(key))


def _read(tokens: Tokens, conv: PatchConv, size: Sequence[int]) -> Mosaic:
    codes, cells = mosaic_codes(conv, size), math.prod(conv.grid)
    mosaic = Mosaic(conv, conv.geometry.unless_whole(conv.grid, size), codes[:cells])
    for key, site in tokens.sites.items():
        limit = site.threshold
        for sketches, places in ((site.v, mosaic.v), (site.q, mosaic.q), (site.k, mosaic.k)):
            if sketches is not None:
                places[key] = places_in_mosaics(sketches, mosaic.codes, limit)
        if not is_whole(mosaic.v[key], cells):
            mosaic.changes[key] = relative_change(site.v[:, None], site.v[None])
        if site.heads is not None:
            heads = {places_in_mosaics(site.heads[:, h], mosaic.codes, limit) for h in range(site.heads.shape[1])}
            if len(heads) > 1 and any(p >= 0 for places_of_head in heads for p in places_of_head):
                mosaic.dilated.add(key)
    limit = max((site.threshold for site in tokens.sites.values()), default=1e-3)
    entries = {call: places_in_mosaics(t, mosaic.codes, limit) for call, t in tokens.entries.items()}
    exits = {
        call: tuple(places_in_mosaics(t, mosaic.codes, limit) for t in all_) for call, all_ in tokens.exits.items()
    }
    return replace(mosaic, entries=entries, exits=exits)


def keys_of_each_cell(key: SiteKey, mosaics: Sequence[Mosaic]) -> int:
    """Return how many keys hold each cell of a grid, where several do, and equally many; else 0."""
    for mosaic in mosaics:
        held = [p for p in mosaic.v.get(key, ()) if p >= 0]
        counts = {held.count(cell) for cell in set(held)}
        if len(set(held)) == mosaic.cells > 1 and len(counts) == 1 and len(held) > mosaic.cells:
            return counts.pop()
    return 0


def describe_keys(key: SiteKey, mosaics: Sequence[Mosaic], *, depends_on_image: bool) -> str:
    """Describe how the keys of a site without a layout depend on the image, as the reason for the user.

    Args:
        key: The site.
        mosaics: The mosaics that were run.
        depends_on_image: Whether V of the site depends on the image in an ordinary forward, where attention mixes
            tokens.
    """
    seen = [m for m in mosaics if key in m.v]
    if not seen:
        return (
            "on the synthetic images that find its patches it does not run each time, or not with the same shapes, as "
            "where layers or tokens are dropped by chance"
        )
    if (count := keys_of_each_cell(key, seen)) > 1:
        return (
            f"each patch of the image is held by {count} of its keys, such as one for each group of channels, one for "
            "each of equal frames, or one for each resolution, so that no key is the patch"
        )
    best = max(seen, key=lambda mosaic: len({p for p in mosaic.v[key] if p >= 0}))
    places = best.v[key]
    moving = sum(p != STATIC for p in places)
    if not moving and depends_on_image:
        return "what it reads (V) depends on the image through other attention alone, so no key holds a part of it"
    if not moving:
        return "what it reads (V) does not depend on the image, so no key holds a part of it"
    if all(p == SEVERAL for p in places):
        return "each of its keys changes with several parts of the image, so none of them is a patch"
    held = [p for p in places if p >= 0]
    cells = f"the {best.conv.placed_grid} cells of a grid that was tried"
    changing = (
        f"{moving} of its {len(places)} keys change with the image, and they are no grid of patches: of {cells}, "
    )
    if len(set(held)) < len(held):
        twice = sum(held.count(cell) > 1 for cell in set(held))
        belong = "belongs" if twice == 1 else "belong"
        return (
            f"{changing}{twice} of them {belong} to two keys or more, and {best.cells - len(set(held))} to no key alone"
        )
    return f"{changing}{len(held)} have a key of their own"
