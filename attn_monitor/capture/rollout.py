"""Attention rollout: where the tokens that a query reads from have themselves read from, down to the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attn_monitor.capture.attention_rows import AttentionSource
from attn_monitor.capture.forward import Forward
from attn_monitor.capture.layer_selection import QuerySpec, encoder_of, resolve_query
from attn_monitor.capture.observation import ReadObservation
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.sites import ReadableSite, RefusedSite, Site
from attn_monitor.errors import ArgumentError, UnsupportedAttentionError

Fusion = Literal["mean", "max", "min"]


def attention_rollout(
    model: nn.Module,
    images: Tensor,
    *,
    query: QuerySpec = "cls",
    head_fusion: Fusion = "mean",
    residual: float = 0.5,
    forward: Forward | None = None,
) -> Tensor:
    """The patch part of ``query``'s row of A_L · … · A_1 as images, (B, gh, gw) float32; all tokens sum to 1.

    A_l is ``residual`` · identity + (1 - ``residual``) · the heads' attention, fused and scaled to rows of sum 1.
    Only the row is carried, from the last layer down, so that fused attention takes O(tokens) memory for each layer;
    explicit attention is kept as the model itself computed it, tokens² for each layer and head.
    Source: Abnar & Zuidema 2020, arXiv 2005.00928.

    Raises `UnsupportedAttentionError` when a layer cannot be read, mixes its heads, or is over other tokens.
    """
    if head_fusion not in ("mean", "max", "min"):
        raise ArgumentError(f'head_fusion={head_fusion!r}: expected "mean", "max" or "min"')
    if not 0 <= residual < 1:
        raise ArgumentError(f"residual={residual}: expected the identity's share, from 0 and below 1, such as 0.5")
    recorder = AttentionRecorder(model, layers="all", query=query, forward=forward, verify="always")
    last = _check_sites(encoder_of(recorder.sites(images)))[-1]
    sources: list[AttentionSource] = []

    def keep(_: ReadableSite, seen: ReadObservation) -> Tensor | None:
        sources.append(seen.source)
        checked = seen.checked_rows
        checked.read("mean")
        return checked.error

    recorder(images, on_layer=keep)
    token = resolve_query(last, query)
    row = torch.zeros(len(images), last.keys, device=images.device)  # (B, T)
    starts = range(last.keys) if token == "mean" else [token] if isinstance(token, int) else token
    row[:, list(starts)] = 1 / len(starts)
    for source in reversed(sources):
        row = residual * row + (1 - residual) * _through(source, row, head_fusion)
    maps: Tensor = row[:, list(last.layout.patches)].unflatten(-1, last.layout.grid)
    return maps


def _through(source: AttentionSource, row: Tensor, head_fusion: Fusion) -> Tensor:
    """The (B, T) row times the fused attention matrix, a few of the matrix's rows at a time."""
    total = torch.zeros_like(row)
    for queries, rows, _ in source.chunks():
        fused: Tensor = rows.mean(1) if head_fusion == "mean" else getattr(rows, f"a{head_fusion}")(1)
        fused = fused / fused.sum(-1, keepdim=True)  # (B, queries, T)
        total += (row[:, None, queries[0] : queries[-1] + 1] @ fused.to(row.dtype))[:, 0]
    return total


def _check_sites(sites: Sequence[Site]) -> list[ReadableSite]:
    """All sites, if each reads from the same tokens as the last one, in the same order."""
    readable = []
    for site in sites:
        if isinstance(site, RefusedSite):
            raise _refusal(site, str(site.refusal))
        readable.append(site)
    for site in readable:
        if problem := _problem(site, readable[-1]):
            raise _refusal(site, problem)
    return readable


def _refusal(site: Site, problem: str) -> UnsupportedAttentionError:
    return UnsupportedAttentionError(
        f"attention rollout needs every layer, and layer {site.index} ({site.name}, {site.op}): {problem}. "
        "Look at single layers with record_attention instead"
    )


def _problem(site: ReadableSite, last: ReadableSite) -> str:
    if site.mixed:
        return "mixes its heads after the softmax, so no matrix says where it reads from"
    if (site.queries, site.keys, site.layout) != (last.keys, last.keys, last.layout):
        return (
            f"has {site.queries} queries and {site.keys} keys where the last layer has {last.keys} tokens, or has them "
            "in another order"
        )
    patches = dict(enumerate(site.layout.patches))
    if {p: q for p, q in site.places.patch_queries.items() if p in patches} != patches:
        return "has its queries in another order than its keys"
    return ""
