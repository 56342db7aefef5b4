"""Compute attention rollout: trace a query's attention through all layers down to the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attn_monitor.capture.layer_selection import QuerySpec, encoder_of, resolve_query
from attn_monitor.capture.observe.attention_rows import AttentionSource
from attn_monitor.capture.observe.forward import Forward
from attn_monitor.capture.observe.observation import ReadObservation
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
    """Compute attention rollout, the query's row of A_L · … · A_1 (Abnar & Zuidema 2020, arXiv 2005.00928).

    A_l is ``residual`` · identity + (1 - ``residual``) · the heads' attention, fused and scaled to rows of sum 1. Only
    one row is carried from the last layer down, so that fused attention takes O(tokens) memory per layer. Explicit
    attention is kept as the model computed it, with tokens² numbers per layer and head.

    Args:
        model: The model, left as it was found.
        images: (B, C, H, W).
        query: See `record_attention`.
        head_fusion: "mean", "max" or "min" over heads.
        residual: Weight of the identity, in [0, 1).
        forward: How to call the model if not as ``model(images)``.

    Returns:
        The patches' part of the row, (B, gh, gw) float32; it sums to 1 together with the other tokens.

    Raises:
        ArgumentError: ``head_fusion`` or ``residual`` is invalid.
        UnsupportedAttentionError: A layer cannot be read, mixes its heads, or attends to other tokens.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> tuple(attention_rollout(model, torch.randn(1, 3, 32, 32)).shape)
        (1, 4, 4)
    """
    if head_fusion not in ("mean", "max", "min"):
        raise ArgumentError(f'head_fusion={head_fusion!r}: expected "mean", "max" or "min"')
    if not 0 <= residual < 1:
        raise ArgumentError(f"residual={residual}: expected the identity's share, from 0 and below 1, such as 0.5")
    recorder = AttentionRecorder(model, layers="all", query=query, forward=forward, verify=True)
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
    """Multiply the (B, T) row by the head-fused attention matrix, chunk by chunk."""
    total = torch.zeros_like(row)
    for queries, rows, _ in source.chunks():
        fused: Tensor = rows.mean(1) if head_fusion == "mean" else getattr(rows, f"a{head_fusion}")(1)
        fused = fused / fused.sum(-1, keepdim=True)  # (B, queries, T)
        total += (row[:, None, queries[0] : queries[-1] + 1] @ fused.to(row.dtype))[:, 0]
    return total


def _check_sites(sites: Sequence[Site]) -> list[ReadableSite]:
    """Return the sites if each has the tokens of the last one in the same order; raise otherwise."""
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
    if site.places.query_grid or {p: q for p, q in site.places.patch_queries.items() if p in patches} != patches:
        return "has its queries in another order than its keys"
    return ""
