"""Outlier patches of a model's layers, and snapshots without them: for pictures, never for numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.layer_selection import QuerySpec
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.measure.outliers import Outliers, outliers_by_attention, outliers_by_norm, without_patches
from attn_monitor.snapshot import Snapshot


def find_outliers(model: nn.Module, images: Tensor, layers: Sequence[int], query: QuerySpec) -> dict[int, Outliers]:
    """Find the outlier patches of each layer on images (B, C, H, W), which run one at a time.

    By the norms of the tokens that enter a layer's block, or where these are not known by the attention that patches
    receive from all tokens.
    """
    found = {}
    received = []
    recorder = AttentionRecorder(model, layers=layers, query=query, tokens=True, nonfinite="keep")
    for attention in _record(recorder, images):
        by_norm = outliers_by_norm(attention)
        if by_norm is None:
            received.append(attention.layer)
        else:
            found[attention.layer] = by_norm
    if received:
        recorder = AttentionRecorder(model, layers=received, query="mean", nonfinite="keep")
        found.update({attention.layer: outliers_by_attention(attention) for attention in _record(recorder, images)})
    return found


def _record(recorder: AttentionRecorder, images: Tensor) -> list[LayerAttention]:
    recorded = [recorder(image[None]) for image in images]
    return [LayerAttention.cat(parts).to("cpu") for parts in zip(*recorded, strict=True)]


def without_outliers(snapshot: Snapshot, outliers: Mapping[int, Outliers]) -> Snapshot:
    """Return the snapshot with attention renormalised without outliers; its metrics stay those of the model."""
    layers = {
        (role, layer): without_patches(attention, outliers[layer].patches) if layer in outliers else attention
        for (role, layer), attention in snapshot.layers.items()
    }
    return replace(snapshot, layers=layers)
