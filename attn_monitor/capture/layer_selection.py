"""Resolve the requested layers and query to sites and token indices, or raise the reason why they cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeGuard

import numpy as np

from attn_monitor.capture.observe.attention_rows import Query
from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.sites import ReadableSite, RefusedSite, Site
from attn_monitor.errors import ArgumentError, AttentionError, LayerError, QueryError
from attn_monitor.grid import Grid

Layers = int | str | Sequence[int | str]
QuerySpec = str | int | tuple[int, ...]
Selection = dict[SiteKey, tuple[ReadableSite, Query]]
"""The requested sites, each with the row to read there."""


def check_query(query: QuerySpec) -> QuerySpec:
    """Return a valid query, with lists as tuples and NumPy integers as int; raise `ArgumentError` otherwise."""
    if isinstance(query, (list, tuple)) and 1 <= len(query) <= 3 and all(map(_is_index, query)):
        return tuple(map(int, query))
    if isinstance(query, str) and query in ("cls", "mean"):
        return query
    if _is_index(query) and query >= 0:
        return int(query)
    raise ArgumentError(
        f'query={query!r}: expected "cls", "mean", a token index, or (row, col) of a patch, with a number for each '
        "axis of the grid"
    )


def check_layers(layers: Layers) -> Layers:
    """Return valid layers with NumPy integers as int; raise `ArgumentError` otherwise."""
    if isinstance(layers, str) and layers == "all":
        return layers
    given: list[Any] = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    if not given or not all(_is_index(w) or (isinstance(w, str) and w not in ("", "all")) for w in given):
        raise ArgumentError(
            f'layers={layers!r}: expected an index (negative from the end), a module path, a list of these, or "all"'
        )
    wanted: list[int | str] = [w if isinstance(w, str) else int(w) for w in given]
    return wanted if isinstance(layers, (list, tuple)) else wanted[0]


def _is_index(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def counts_from_end(layers: Layers) -> bool:
    """Return whether the request contains "all" or a negative index."""
    wanted = layers if isinstance(layers, (list, tuple)) else [layers]
    return "all" in wanted or any(isinstance(want, int) and want < 0 for want in wanted)


def encoder_of(sites: Sequence[Site]) -> list[Site]:
    """Return the layers that negative indices and "all" count, without a second stack such as an MAE's decoder."""
    return [site for site in sites if not site.stack]


def stack_notes(sites: Sequence[Site]) -> list[str]:
    """Return a note for each second stack, with the argument that selects it."""
    stacks: dict[str, list[int]] = {}
    for site in sites:
        if site.stack:
            stacks.setdefault(site.stack, []).append(site.index)
    return [
        f"{name} (layer{f's {indices[0]} to {indices[-1]}' if len(indices) > 1 else f' {indices[0]}'}) is a second "
        f"stack, which is watched by layers={name!r}"
        for name, indices in stacks.items()
    ]


def left_out(sites: Sequence[Site], query: QuerySpec) -> dict[int, str]:
    """Map the index of each layer that layers="all" leaves out to the reason."""
    return {index: str(reason) for index, reason in _every_layer(sites, query)[1].items()}


def select_sites(sites: Sequence[Site], layers: Layers, query: QuerySpec) -> Selection:
    """Select the requested sites in order of execution, each with the row to read there.

    Args:
        sites: Every site of the model.
        layers: The request; "all" skips encoder layers that cannot be read.
        query: The requested query.

    Raises:
        AttentionError: A requested layer does not exist, cannot be read, or has no such query.
    """
    if layers == "all":
        selected, reasons = _every_layer(sites, query)
        if reasons and not selected:
            last = list(reasons.values())[-1]
            raise type(last)(str(last))  # a copy: the traceback on the site's own error would keep the model alive
        return selected
    wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
    selected = {}
    for site in (sites[i] for i in sorted({i for want in wanted for i in _find_layer(sites, want)})):
        if isinstance(site, RefusedSite):
            raise _with_alternatives(site.refusal, sites, query)
        selected[site.key] = (site, resolve_query(site, query))
    return selected


def _every_layer(sites: Sequence[Site], query: QuerySpec) -> tuple[Selection, dict[int, AttentionError]]:
    """Select the encoder's layers that have this query, and map the index of each other layer to the reason."""
    selected: Selection = {}
    reasons: dict[int, AttentionError] = {}
    for site in encoder_of(sites):
        if isinstance(site, RefusedSite):
            reasons[site.index] = site.refusal
            continue
        try:
            selected[site.key] = (site, resolve_query(site, query))
        except AttentionError as error:
            reasons[site.index] = error
    return selected, reasons


def _with_alternatives(refusal: AttentionError, sites: Sequence[Site], query: QuerySpec) -> AttentionError:
    """Return a refusal that names the layers that can be read, and the arguments that choose the last of them."""
    others = "No other layer of this model can be read either"
    readable = [site for site in sites if isinstance(site, ReadableSite)]
    for wanted in dict.fromkeys((query, "mean")):
        if usable := [site for site in readable if _has_query(site, wanted)]:
            also = "" if wanted == query else f", query={wanted!r}"
            others = (
                f"Choose another layer. Layers that can be read: {[site.index for site in usable]}, the last one by "
                f"layers={usable[-1].index}{also} ({usable[-1].name})"
            )
            break
    else:
        if readable:
            others += f" with query={query!r}"
    return type(refusal)(f"{refusal}. {others}")


def _has_query(site: ReadableSite, query: QuerySpec) -> bool:
    try:
        resolve_query(site, query)
    except QueryError:
        return False
    return True


def _find_layer(sites: Sequence[Site], want: int | str) -> list[int]:
    if isinstance(want, int) and not isinstance(want, bool):
        encoder = encoder_of(sites)
        if -len(encoder) <= want < 0:
            return [encoder[want].index]
        if 0 <= want < len(sites):
            return [want]
        beside = f", {len(encoder)} of them the encoder's" if len(encoder) < len(sites) else ""
        raise LayerError(
            f"layers={want}: expected {-len(encoder)} to {len(sites) - 1}; this model has {len(sites)} layers{beside}"
        )
    paths = {s.index: (s.key[0], *s.others) for s in sites}
    named = [s.index for s in sites if s.name == want or any(f"{p}.".startswith(f"{want}.") for p in paths[s.index])]
    if not named:
        raise LayerError(
            f"layers={want!r}: no attention ran there. Attention ran in: {', '.join(s.name for s in sites)}"
        )
    return named


def resolve_query(site: ReadableSite, query: QuerySpec) -> Query:
    """Return the query's token index at this site, "mean", or the indices to average; raise `QueryError` if absent."""
    where, places = f"layer {site.index} ({site.name})", site.places
    if query == "mean":
        if reason := _no_mean(site):
            raise QueryError(f"{where} has {reason}")
        return "mean" if len(places.counted) == site.queries else places.counted
    if isinstance(query, int):
        if query < site.queries:
            return query
        raise QueryError(f"query={query}: {where} has tokens 0 to {site.queries - 1}")
    if isinstance(query, tuple):
        return _patch_query(site, query, where)
    if places.cls is not None:
        return places.cls
    if places.cls_of_sequences:
        return places.cls_of_sequences
    raise QueryError(_no_cls(site, where))


def _no_mean(site: ReadableSite) -> str:
    """Return why there is no mean over the queries of a site; "" where there is one."""
    if site.places.partial_queries:
        tokens = f"more queries ({site.queries}) than tokens" if site.queries > site.keys else "some of the queries"
        return f"{tokens}: there is no mean over the tokens here"
    if not site.places.counted:
        return (
            f"{site.queries} queries, and which of them are patches or the model's own tokens was not found: there is "
            "no mean over them here. Choose one by its index, query=<index>"
        )
    return ""


def _patch_query(site: ReadableSite, query: tuple[int, ...], where: str) -> int:
    finer = site.places.query_grid
    grid = site.layout.grid if finer is None else finer
    outside = len(query) != len(grid) or not all(0 <= line < lines for line, lines in zip(query, grid, strict=True))
    if outside and site.places.patch_queries:
        shape = f"{grid[0]} rows and {grid[1]} columns" if len(grid) == 2 else str(Grid(grid))
        what = "patches" if finer is None else "queries"
        raise QueryError(f"query={query}: {where} has a grid of {shape} {'of ' * (len(grid) == 2)}{what}")
    index = None if outside else site.places.patch_queries.get(int(np.ravel_multi_index(query, grid)))
    if index is None:
        what = "a single query token" if site.queries == 1 else f"{site.queries} queries"
        raise QueryError(
            f"{where} has {what}, none of which is known to be patch {query}; use "
            + 'query="mean" or ' * (not _no_mean(site))
            + "a token index"
        )
    return index


def _no_cls(site: ReadableSite, where: str) -> str:
    if not site.places.no_cls_reason:
        tokens = "tokens" if site.queries == site.keys else "queries"
        what = (
            f"{site.queries} {tokens}, all of them patches" if site.queries > 1 else "a single query, which is a patch"
        )
        if site.places.partial_queries:
            return f"{where} has {what}, so there is no CLS token. Choose another layer: others may have other queries"
        return (
            f'{where} has {what}, so there is no CLS token. Use query="mean": the attention each patch receives, '
            "averaged over all queries"
        )
    mean = ', or use query="mean"' * (not _no_mean(site))
    return f"{where}: {site.places.no_cls_reason}. Choose one by its index, query=<index>{mean}"
