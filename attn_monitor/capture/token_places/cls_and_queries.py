"""Find the query of each patch, and the CLS token among the other queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places import finer_queries
from attn_monitor.capture.token_places.layout import STATIC, TokenLayout, is_whole, layout_of, mostly_single
from attn_monitor.capture.token_places.site_places import Mosaic, PlaceSearch, SitePlaces
from attn_monitor.capture.token_places.synthetic_images import corners_changed, mosaics, noise_images
from attn_monitor.capture.token_places.token_parameters import TokenParameter
from attn_monitor.capture.token_places.tokens import SiteTokens, Tokens


def find_queries(search: PlaceSearch) -> PlaceSearch:
    """Find the query of each patch of the keys' grid, and the layouts of tokens that enter the enclosing modules."""
    changed: dict[SiteKey, SitePlaces] = {}
    for key, site, layout in search.placed():
        mosaic = search.mosaic_of(layout)
        if mosaic is None or key not in search.reference.sites:
            continue
        tokens = search.reference.sites[key]
        # More queries than tokens are finer patches, or padding, which is cut off again and must not be in a mean.
        more = tokens.queries > max(len(layout.order), 1)
        partial = site.partial_queries or (more and not _finer_patches(search, key))
        known, grid = site.patch_queries or (_patch_queries(mosaic, key) if key in mosaic.q else {}), site.query_grid
        if not known:
            known, grid = finer_queries.in_mosaics(search, key)
        entries = _entering_layouts(mosaic, tokens, layout)
        changed[key] = replace(site, partial_queries=partial, patch_queries=known, query_grid=grid, entries=entries)
    return search.with_sites(changed)


def _patch_queries(mosaic: Mosaic, key: SiteKey) -> dict[int, int]:
    """Return the query of each cell, also of patches replaced by a mask token; empty where queries share a cell."""
    places = mosaic.q[key]
    held = [p for p in places if p >= 0]
    if len(held) != len(set(held)) or not mostly_single(places):
        return {}
    masked = layout_of(places, mosaic.conv.grid, "exact", mosaic.geometry)
    return {p: t for t, p in enumerate(places) if p >= 0} if masked is None else dict(enumerate(masked.patches))


def _entering_layouts(mosaic: Mosaic, tokens: SiteTokens, keys: TokenLayout) -> dict[str, TokenLayout]:
    """Return the layouts of the tokens that enter the modules around a site, by path."""
    entering = {call[0]: mosaic.entries[call] for call in tokens.within if call in mosaic.entries}
    layouts = {path: layout_of(places, keys.grid, "exact", keys.geometry) for path, places in entering.items()}
    if keys.evidence == "centres" and not any(layouts.values()):
        # Overlapping fields give no exact layout, so the entering tokens are taken to be in the order of the keys.
        return {path: keys for path, places in entering.items() if len(places) == len(keys.order)}
    return {path: layout for path, layout in layouts.items() if layout is not None}


@dataclass(frozen=True)
class _Nudge:
    """Hold the tokens of the first mosaic image after one parameter was changed."""

    parameter: TokenParameter
    tokens: Tokens


@dataclass(frozen=True)
class _Moved:
    """Hold the queries and keys that change with a parameter while no patch does: it is one token, or several."""

    parameter: TokenParameter
    queries: frozenset[int]
    keys: frozenset[int]


def find_cls(search: PlaceSearch) -> PlaceSearch:
    """Find the CLS token and the registers at every site: they change with a parameter while the patches do not."""
    model, reference, changed = search.ablated_model, search.reference, dict[SiteKey, SitePlaces]()
    first = mosaics(search.images, search.mosaics[0].conv)[:1]
    nudges = [_Nudge(p, model(first, 1, nudged=[p])) for p in model.token_parameters or ()]
    parts = _parts_of_the_image(search)
    for key, site, layout in search.placed():
        if key not in reference.sites:
            continue
        before, held = reference.sites[key], set(site.patch_queries.values())
        moved = [m for n in nudges if (m := _moved_by(n, key, before, held, set(layout.patches))) is not None]
        whole, part = parts[key]
        others = [t for t in range(before.queries) if t not in held]
        cls, no_cls_reason = _choose_cls(before, moved, others, whole, part)
        of_sequences = _cls_of_sequences(moved, before.queries, model.formats[key].sequences)
        own = whole | {t for m in moved for t in m.queries if t not in part}
        own |= {t for n in nudges if n.parameter.is_class for t in _beside_patches(n, key, before, held)}
        on_grid = held or _finer_patches(search, key) or _on_another_grid(search, key)
        alone = set() if cls is None else {cls}
        names = _names(moved, cls, layout, before, whole)
        if of_sequences and before.queries == before.v.shape[1]:
            names |= {token: f"CLS {number}" for number, token in enumerate(of_sequences) if token in layout.prefix}
        of_cls = [n for n in nudges if _is_cls(n.parameter, moved, cls)]
        entries, cls_at = _cls_first_in_entries(site, before, of_cls, reference)
        changed[key] = replace(
            site,
            cls=cls,
            no_cls_reason="" if of_sequences else no_cls_reason,
            cls_of_sequences=of_sequences,
            counted=tuple(sorted(on_grid | own | alone)) if on_grid or before.queries == 1 else (),
            prefix_names=names,
            layout=_with_first(layout, {t for t, name in names.items() if name == "CLS"}),
            entries=entries,
            cls_at=cls_at,
        )
    return replace(search.with_sites(changed), nudged=tuple(nudge.tokens for nudge in nudges))


def _moved_by(nudge: _Nudge, key: SiteKey, before: SiteTokens, held: set[int], patches: set[int]) -> _Moved | None:
    """Return the tokens that a nudged parameter changes at a site; None where it changes none, or patches too."""
    after = nudge.tokens.sites.get(key)
    if after is None or after.v.shape[1:] != before.v.shape[1:]:
        return None
    keys, queries = frozenset(_changed(after.v, before.v, before.threshold)), frozenset[int]()
    if after.q is not None and before.q is not None and after.q.shape[1:] == before.q.shape[1:]:
        queries = frozenset(_changed(after.q, before.q, before.threshold))
    if not (keys or queries) or keys & patches or queries & held:
        return None
    return _Moved(nudge.parameter, queries, keys)


def _beside_patches(nudge: _Nudge, key: SiteKey, before: SiteTokens, held: set[int]) -> set[int]:
    """Return the one query beside the patches that changes with a class parameter, where patches may change too."""
    after = nudge.tokens.sites.get(key)
    if after is None or after.q is None or before.q is None or after.q.shape[1:] != before.q.shape[1:]:
        return set()
    moved = set(_changed(after.q, before.q, before.threshold)) - held
    return moved if len(moved) == 1 else set()


def _changed(after: Tensor, before: Tensor, limit: float) -> list[int]:
    """Return the tokens that differ in the first image."""
    return [int(t) for t in (relative_change(after[0], before[0]) > limit).nonzero().flatten()]


def _parts_of_the_image(search: PlaceSearch) -> dict[SiteKey, tuple[set[int], set[int]]]:
    """Return for each site the queries that depend on the whole image, such as a mean, and those on a part of it."""
    found: dict[SiteKey, tuple[set[int], set[int]]] = {}
    several: dict[SiteKey, list[int]] = {}
    for key, site, layout in search.placed():
        mosaic, held = search.mosaic_of(layout), set(site.patch_queries.values())
        places = () if mosaic is None else mosaic.q.get(key, ())
        depend = [t for t, p in enumerate(places) if p != STATIC and t not in held]
        found[key] = set(), set(depend)
        if depend and len(depend) <= 8:  # more are patches that were not assigned
            several[key] = depend
    if several:
        base = noise_images(search.images, 1, seed=4)[0]
        seen = search.ablated_model(torch.cat([base[None], corners_changed(base)]), 3).sites
        for key, tokens in several.items():
            q = seen[key].q if key in seen else None
            if q is not None and q.shape[1] > max(tokens):
                moved = (relative_change(q[1:], q[:1]) > seen[key].threshold / 4).all(0).tolist()
                whole = {t for t in tokens if moved[t]}
                found[key] = whole, set(tokens) - whole
    return found


def _on_another_grid(search: PlaceSearch, key: SiteKey) -> set[int]:
    """Return the queries of a site that are the patches of another grid than that of its keys."""
    grids = [m.q[key] for m in search.mosaics if key in m.q and is_whole(m.q[key], m.cells) and m.cells > 1]
    return {t for places in grids[:1] for t, p in enumerate(places) if p >= 0}


def _finer_patches(search: PlaceSearch, key: SiteKey) -> set[int]:
    """Return the queries of a site that depend on the image, if they are as many as a convolution has cells.

    Keys and values may be pooled while queries are not: what a query is a patch of need not be known for their mean.
    """
    seen = search.reference.sites[key]
    if seen.q is None or seen.queries <= seen.v.shape[1]:
        return set()
    moved = (relative_change(seen.q[1:], seen.q[:1]) > seen.threshold).any(0).nonzero().flatten().tolist()
    return set(moved) if len(moved) in {math.prod(conv.grid) for conv in search.convs} else set()


def _choose_cls(
    before: SiteTokens, moved: Sequence[_Moved], others: Sequence[int], whole: set[int], part: set[int]
) -> tuple[int | None, str]:
    """Choose the CLS token among the queries that are no patch.

    Args:
        before: Tokens of the site in the reference forward.
        moved: What each parameter changes at the site, where it changes no patch.
        others: Indices of the queries that are no patch.
        whole: Queries that depend on the whole image.
        part: Queries that depend on a part of the image and are not assigned to a patch.

    Returns:
        The query index and "", or None and the reason; None and "" where every query is a patch.
    """
    if not others:
        return None, ""
    moves = [m for m in moved if not m.queries & part]
    alone = {min(m.queries) for m in moves if len(m.queries) == 1}
    owners = {t: [m.parameter for m in moves if t in m.queries] for t in others}
    named = [t for t in others if owners[t] and all(p.is_no_class for p in owners[t])]
    # A mean of the patches could be CLS too. Names decide only between what behaves as a token.
    tokens = [t for t in others if t in alone | whole and t not in named]
    if len(tokens) > 1:
        tokens = [t for t in tokens if t in alone and any(p.is_class for p in owners[t])] or tokens
    if len(tokens) == 1 and (tokens[0] in alone or len(others) == 1 + len(named)):
        return tokens[0], ""
    if len(tokens) > 1:
        return (
            None,
            f"{len(tokens)} of its queries could be the CLS token, {sorted(tokens)}: each changes with a parameter of "
            f"its own{' or holds the whole image' * bool({*tokens} - alone)}, and names do not decide between them",
        )
    several = max((m for m in moved if not m.parameter.is_no_class), key=lambda m: len(m.queries), default=None)
    if several is not None and len(several.queries) > 1:
        return None, (
            f"{len(several.queries)} of its queries could be the CLS token, {sorted(several.queries)}: they change "
            f"together with {several.parameter.path}"
        )
    if before.queries == 1 and 0 not in part:
        return 0, ""  # the only query; `check_outputs` refuses it if its result goes to patches
    if before.q is None:
        return None, "its scores do not follow from one product of queries and keys, by which queries are distinguished"
    names = ", ".join(sorted({p.path for t in named for p in owners[t]}))
    return None, (
        f"it has {len(others)} queries that are not patches, at {list(others)[:20]}, and none was found to be the CLS "
        "token: "
        + (f"by the names of their parameters ({names}), {named[:20]} are others, and " if named else "")
        + f"no {'other ' * bool(named)}parameter that could be a token changes one of them alone (registers, padding "
        "and pooled tokens are not CLS)"
    )


def _cls_of_sequences(moved: Sequence[_Moved], queries: int, sequences: int) -> tuple[int, ...]:
    """Return the CLS token of each sequence, where one parameter changes the same query of all; empty if none does."""
    if sequences == 1:
        return ()
    each = queries // sequences
    possible = {m.queries: m.parameter for m in moved if not m.parameter.is_no_class}
    possible = {q: p for q, p in possible.items() if len(q) == sequences and len({t % each for t in q}) == 1}
    named = {q: p for q, p in possible.items() if p.is_class}
    found = named if len(possible) > 1 else possible
    return tuple(sorted(next(iter(found)))) if len(found) == 1 else ()


def _names(
    moved: Sequence[_Moved], cls: int | None, layout: TokenLayout, before: SiteTokens, whole: set[int]
) -> dict[int, str]:
    """Name the keys beside the patches that were found to be the CLS token or a register."""
    names = {t: "register" for m in moved if m.parameter.is_register for t in m.keys}
    found = [m for m in moved if _is_cls(m.parameter, moved, cls) and len(m.keys) == 1]
    names |= {t: "CLS" for m in found for t in m.keys}
    if cls in whole and before.queries == before.v.shape[1]:  # the mean is a key too
        names[cls] = "CLS"
    return {t: name for t, name in names.items() if t in layout.prefix}


def _is_cls(parameter: TokenParameter, moved: Sequence[_Moved], cls: int | None) -> bool:
    return cls is not None and any(m.parameter is parameter and m.queries == {cls} for m in moved)


def _cls_first_in_entries(
    site: SitePlaces, before: SiteTokens, nudges: Sequence[_Nudge], reference: Tokens
) -> tuple[dict[str, TokenLayout], dict[str, int]]:
    """Return the layouts of what enters the modules around, with the CLS token first in their prefix, and its index.

    It is the token that the class parameter changes.
    """
    entries: dict[str, TokenLayout] = {}
    cls_at: dict[str, int] = {}
    for call in before.within:
        if (entering := reference.entries.get(call)) is None:
            continue
        changed: set[int] = set()
        for nudge in nudges:
            after = nudge.tokens.entries.get(call)
            if after is not None and after.shape[1:] == entering.shape[1:]:
                changed.update(_changed(after, entering, before.threshold))
        if len(changed) == 1:
            cls_at[call[0]] = min(changed)
        if (layout := site.entries.get(call[0])) is not None:
            entries[call[0]] = _with_first(layout, changed & set(layout.prefix))
    return entries, cls_at


def _with_first(layout: TokenLayout, cls: set[int]) -> TokenLayout:
    """Return the layout with the CLS token first in its prefix, unchanged unless there is exactly one candidate."""
    if len(cls) != 1:
        return layout
    return replace(layout, prefix=(*cls, *(t for t in layout.prefix if t not in cls)))
