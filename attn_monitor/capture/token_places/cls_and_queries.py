"""Which query holds which patch, and which of them is the CLS token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from attn_monitor.capture.observation import SiteKey
from attn_monitor.capture.token_places.layout import TokenLayout, layout_of, mostly_single
from attn_monitor.capture.token_places.random_projections import relative_change
from attn_monitor.capture.token_places.site_places import Mosaic, PlaceSearch, SitePlaces
from attn_monitor.capture.token_places.synthetic_images import mosaics
from attn_monitor.capture.token_places.tokens import SiteTokens, Tokens

_CLASS_NAME, _REGISTER_NAME = re.compile(r"cls|class"), re.compile(r"reg_|register|storage")


def find_queries(search: PlaceSearch) -> None:
    """Which query holds which patch of the keys' grid, and the layouts of what enters the modules around."""
    for key, site, layout in search.placed():
        mosaic = search.mosaic_of(layout)
        if mosaic is None or key not in search.reference.sites:
            continue
        tokens = search.reference.sites[key]
        # Queries that are no token are cut off again (padding), and no part of a mean.
        site.partial_queries = site.partial_queries or tokens.queries > max(len(layout.order), 1)
        if not site.patch_queries and key in mosaic.q:
            site.patch_queries = _patch_queries(mosaic, key)
        site.entries = _entering_layouts(mosaic, tokens, layout)


def _patch_queries(mosaic: Mosaic, key: SiteKey) -> dict[int, int]:
    """The query of each cell, also of patches that a mask token replaced; empty where cells are held twice."""
    places = mosaic.q[key]
    held = [p for p in places if p >= 0]
    if len(held) != len(set(held)) or not mostly_single(places):
        return {}
    masked = layout_of(places, mosaic.conv.grid, "exact", mosaic.geometry)
    return {p: t for t, p in enumerate(places) if p >= 0} if masked is None else dict(enumerate(masked.patches))


def _entering_layouts(mosaic: Mosaic, tokens: SiteTokens, keys: TokenLayout) -> dict[str, TokenLayout]:
    """Layouts of the tokens that enter the modules around a site, by path."""
    entering = {call[0]: mosaic.entries[call] for call in tokens.within if call in mosaic.entries}
    layouts = {path: layout_of(places, keys.grid, "exact", keys.geometry) for path, places in entering.items()}
    if keys.evidence == "centres" and not any(layouts.values()):
        # Where no token has an exact place, those that enter are taken to be in the order of the keys.
        return {path: keys for path, places in entering.items() if len(places) == len(keys.order)}
    return {path: layout for path, layout in layouts.items() if layout is not None}


def find_cls(search: PlaceSearch) -> None:
    """Which query is CLS: the one that moves when the class token's parameter is changed."""
    model, reference = search.silent_model.model, search.reference
    first = mosaics(search.images, search.mosaics[0].conv)[:1]
    nudges = [search.silent_model(first, 1, nudged=[owner]) for owner in _class_parameters(model)]
    registers = any(
        _REGISTER_NAME.search(name) for m in model.modules() for name, _ in m.named_parameters(recurse=False)
    )
    for key, site, layout in search.placed():
        if key not in reference.sites:
            continue
        before, held = reference.sites[key], set(site.patch_queries.values())
        others = [t for t in range(before.queries) if t not in held]
        moved_queries, moved_keys = _moved_by(nudges, key, before)
        site.cls, site.no_cls_reason = _choose_cls(before, moved_queries, others, registers)
        site.layout = _with_first(layout, moved_keys & set(layout.prefix))
        _put_cls_first_in_entries(site, before, nudges, reference)


def _class_parameters(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parameters that are a class token by their name, as (module, name)."""
    found = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            small = parameter is not None and parameter.is_floating_point() and parameter.numel() <= 65536
            if small and _CLASS_NAME.search(name) and not hasattr(parameter, "ds_id"):
                found.append((module, name))
    return found[:4]


def _moved_by(nudges: Sequence[Tokens], key: SiteKey, before: SiteTokens) -> tuple[list[list[int]], set[int]]:
    """The queries at a site that each nudged parameter moves, if any; and the keys that one of them does."""
    moved_queries: list[list[int]] = []
    moved_keys: set[int] = set()
    for nudge in nudges:
        after = nudge.sites.get(key)
        if after is None or after.v.shape[1:] != before.v.shape[1:]:
            continue
        if after.q is not None and before.q is not None and after.q.shape[1:] == before.q.shape[1:]:
            moved_queries.append(_changed(after.q, before.q, before.threshold))
        moved_keys.update(_changed(after.v, before.v, before.threshold))
    return [queries for queries in moved_queries if queries], moved_keys


def _changed(after: Tensor, before: Tensor, limit: float) -> list[int]:
    """Tokens that differ in the first image."""
    return [int(t) for t in (relative_change(after[0], before[0]) > limit).nonzero().flatten()]


def _choose_cls(
    before: SiteTokens, moved: Sequence[list[int]], others: Sequence[int], registers: bool
) -> tuple[int | None, str]:
    """The query index of CLS among the ``others``, which are no patch; or why there is none."""
    alone = sorted({m[0] for m in moved if len(m) == 1})
    if moved and len(alone) == 1 and alone[0] in others:
        return alone[0], ""
    if moved and any(len(m) > 1 for m in moved) and not alone:
        several = max(moved, key=len)
        if len(several) > len(others):
            return None, "its class parameter takes part in every token, so no single token is CLS"
        return None, f"it has {len(several)} class tokens, at {several}, and nothing tells which one is meant"
    if len(alone) > 1:
        return None, f"it has {len(alone)} class tokens, at {alone}, and nothing tells which one is meant"
    if before.q is None and before.queries > 1:
        return None, "what its queries are made of could not be seen"
    if not others:
        return None, ""
    if len(others) == 1 and not (registers and before.queries > 1):
        return others[0], ""
    return None, (
        f"it has {len(others)} queries that are not patches, at {list(others)[:20]}, and nothing tells which is the "
        "CLS token (registers are not)"
    )


def _put_cls_first_in_entries(
    site: SitePlaces, before: SiteTokens, nudges: Sequence[Tokens], reference: Tokens
) -> None:
    """The prefix of what enters the modules around a site starts with the token that the class parameter moves."""
    entries = {}
    for call in before.within:
        layout, entering = site.entries.get(call[0]), reference.entries.get(call)
        if layout is None or entering is None:
            continue
        changed: set[int] = set()
        for nudge in nudges:
            after = nudge.entries.get(call)
            if after is not None and after.shape[1:] == entering.shape[1:]:
                changed.update(_changed(after, entering, before.threshold))
        entries[call[0]] = _with_first(layout, changed & set(layout.prefix))
    site.entries = entries


def _with_first(layout: TokenLayout, cls: set[int]) -> TokenLayout:
    """The layout whose prefix starts with CLS, if it is one token that could be."""
    if len(cls) != 1:
        return layout
    return replace(layout, prefix=(*cls, *(t for t in layout.prefix if t not in cls)))
