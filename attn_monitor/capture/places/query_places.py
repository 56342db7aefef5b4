"""Which query holds which patch, and which of them is the CLS token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from attn_monitor.capture.observer import SiteKey
from attn_monitor.capture.places import layout as lay
from attn_monitor.capture.places.layout import TokenLayout
from attn_monitor.capture.places.silent_forward import SiteTokens, Tokens
from attn_monitor.capture.places.silent_runs import Asker
from attn_monitor.capture.places.site_places import Mosaic, SitePlaces, limit_of, mosaic_of

_CLASS_NAME, _REGISTER_NAME = re.compile(r"cls|class"), re.compile(r"reg_|register|storage")


def find_queries(found: Mapping[SiteKey, SitePlaces], mosaics: Sequence[Mosaic], reference: Tokens) -> None:
    """Which query holds which patch of the keys' grid, and the layouts of what enters the modules around."""
    for key, site in found.items():
        mosaic = None if site.layout is None else mosaic_of(mosaics, site.layout)
        if site.layout is None or mosaic is None or key not in reference.sites:
            continue
        # Queries that are no token are cut off again (padding), and no part of a mean.
        site.part = site.part or reference.sites[key].queries > max(len(site.layout.order), 1)
        if not site.patch_queries and key in mosaic.q:
            held = [p for p in mosaic.q[key] if p >= 0]
            if len(held) == len(set(held)) and lay.has_own(mosaic.q[key]):
                site.patch_queries = {p: t for t, p in enumerate(mosaic.q[key]) if p >= 0}
                masked = lay.layout_of(mosaic.q[key], site.layout.grid, "exact")
                if masked is not None:  # also the queries of patches that a mask token replaced
                    site.patch_queries = dict(enumerate(masked.patches))
        within = {call[0]: mosaic.entries.get(call) for call in reference.sites[key].within}
        layouts = {path: lay.layout_of(p, site.layout.grid, "exact") for path, p in within.items() if p is not None}
        if site.layout.evidence == "centres" and not any(layouts.values()):
            # Where no token can be told exactly, those that enter are taken to be in the order of the keys.
            layouts = {
                path: site.layout for path, p in within.items() if p is not None and len(p) == len(site.layout.order)
            }
        site.entries = {path: layout for path, layout in layouts.items() if layout is not None}


def _class_parameters(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parameters that are a class token by their name, as (module, name)."""
    found = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            small = parameter is not None and parameter.is_floating_point() and parameter.numel() <= 65536
            if small and _CLASS_NAME.search(name) and not hasattr(parameter, "ds_id"):
                found.append((module, name))
    return found[:4]


def find_cls(
    ask: Asker,
    images: Tensor,
    found: Mapping[SiteKey, SitePlaces],
    mosaics: Sequence[Mosaic],
    reference: Tokens,
) -> None:
    """Which query is CLS: the one that moves when the class token's parameter is changed."""
    first = lay.mosaics(images, mosaics[0].conv)[:1]
    nudges = [ask(first, 1, nudged=[owner]) for owner in _class_parameters(ask.model)]
    registers = any(
        _REGISTER_NAME.search(name) for m in ask.model.modules() for name, _ in m.named_parameters(recurse=False)
    )
    for key, site in found.items():
        if site.layout is None or key not in reference.sites:
            continue
        before, held = reference.sites[key], set(site.patch_queries.values())
        others = [t for t in range(before.queries) if t not in held]
        moved_keys: list[int] = []
        moved: list[list[int]] = []
        for nudge in nudges:
            after = nudge.sites.get(key)
            if after is None or after.v.shape[1:] != before.v.shape[1:]:
                continue
            limit = limit_of(before)
            if after.q is not None and before.q is not None and after.q.shape[1:] == before.q.shape[1:]:
                moved.append(_changed(after.q, before.q[:1], limit))
            moved_keys += [t for t in _changed(after.v, before.v[:1], limit) if t in site.layout.prefix]
        site.cls, site.no_cls = _choose_cls(site, before, [m for m in moved if m], others, registers)
        _put_cls_first(site, moved_keys, nudges, reference, key)


def _changed(after: Tensor, before: Tensor, limit: float) -> list[int]:
    return [int(t) for t in (lay.changes(after[0], before[0]) > limit).nonzero().flatten()]


def _choose_cls(
    site: SitePlaces, before: SiteTokens, moved: Sequence[list[int]], others: Sequence[int], registers: bool
) -> tuple[int | None, str]:
    """The query index of CLS, or why there is none."""
    assert site.layout is not None
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


def _put_cls_first(
    site: SitePlaces, moved_keys: Sequence[int], nudges: Sequence[Tokens], reference: Tokens, key: SiteKey
) -> None:
    """The prefix starts with the CLS key, in the operation and in what enters the modules around it."""
    assert site.layout is not None
    keys = sorted(set(moved_keys))
    site.layout = _with_first(site.layout, keys)
    entries = {}
    for call in reference.sites[key].within:
        layout, before = site.entries.get(call[0]), reference.entries.get(call)
        if layout is None or before is None:
            continue
        limit, changed = limit_of(reference.sites[key]), set()
        for nudge in nudges:
            after = nudge.entries.get(call)
            if after is not None and after.shape[1:] == before.shape[1:]:
                changed.update(_changed(after, before[:1], limit))
        entries[call[0]] = _with_first(layout, sorted(changed & set(layout.prefix)))
    site.entries = entries


def _with_first(layout: TokenLayout, cls: Sequence[int]) -> TokenLayout:
    if len(cls) != 1:
        return layout
    prefix = (cls[0], *(t for t in layout.prefix if t != cls[0]))
    return TokenLayout(layout.grid, prefix, layout.patches, layout.evidence)
