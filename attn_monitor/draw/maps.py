"""The maps that pictures show, their statistics and captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.snapshot import Snapshot

PRACTICALLY_UNIFORM = 0.995
"""Entropy above which a map is called uniform and gets no outline: the order of its patches is noise."""


@dataclass(frozen=True)
class MapStatistics:
    """Statistics of maps (..., gh, gw), by the functions that compute the metrics.

    Args:
        entropy: Normalised entropy, 0 to 1, (...); NaN for signed weights.
        mask_area: Share of patches in the mass mask, (...); NaN for signed weights.
        mask: The mask to outline, bool (..., gh, gw): the mass mask, empty where attention is practically uniform.
    """

    entropy: Tensor
    mask_area: Tensor
    mask: Tensor


def map_statistics(maps: Tensor, threshold: float) -> MapStatistics:
    """Compute the statistics of maps (..., gh, gw) with a mask that holds the share ``threshold`` of attention."""
    flat = maps.flatten(-2)
    entropy, mask = F.entropy(flat), F.mass_mask(flat, threshold)
    outlined = mask & (entropy <= PRACTICALLY_UNIFORM)[..., None]
    return MapStatistics(entropy, F.area_of(mask, flat), outlined.unflatten(-1, maps.shape[-2:]))


def map_captions(labels: Sequence[str], maps: Tensor, statistics: MapStatistics) -> list[str]:
    """Write a caption for each of the maps (M, gh, gw): label, entropy, and the mask's area if it is outlined."""
    finite = maps.isfinite().all(-1).all(-1).tolist()
    numbers = zip(labels, statistics.entropy.tolist(), statistics.mask_area.tolist(), finite, strict=True)
    return [" · ".join(filter(None, (label, _numbers(*values)))) for label, *values in numbers]


def _numbers(entropy: float, mask_area: float, finite: bool) -> str:
    if not finite:
        return "missing"
    if math.isnan(entropy):
        return ""  # signed weights
    return f"H {entropy:.2f} · " + ("uniform" if entropy > PRACTICALLY_UNIFORM else f"{mask_area:.0%}")


def mean_and_heads(maps: Tensor, heads: tuple[int, ...] | None) -> tuple[Tensor, list[str]]:
    """Put the mean of maps (H, gh, gw) before the maps of some heads, all if None.

    Returns:
        The maps, (1 + heads, gh, gw), and their labels.
    """
    shown = [h for h in (range(len(maps)) if heads is None else heads) if h < len(maps)]
    return torch.cat([maps.mean(0, keepdim=True), maps[shown]]), ["mean", *(f"head {h}" for h in shown)]


def has_layer(snapshot: Snapshot, role: str, layer: int) -> bool:
    """Return True if a role's layer was captured; a negative layer counts from the last."""
    captured = snapshot.layers_of(role)
    return layer in captured or (layer < 0 and -layer <= len(captured))


def colors_or_missing(snapshot: Snapshot, role: str, layer: int, image: int, missing: Tensor) -> Tensor:
    """Return the colours of an image's patches, (gh, gw, 3); ``missing`` if there are none of its shape."""
    if not has_layer(snapshot, role, layer) or image >= len(snapshot.names):
        return missing
    attention = snapshot.layer(role, layer)
    if attention.colors is None or attention.grid != tuple(missing.shape[:2]):
        return missing
    colors: Tensor = attention.colors[image].unflatten(0, attention.grid)
    return colors


def map_or_missing(snapshot: Snapshot, role: str, layer: int, image: int, head: int | None, missing: Tensor) -> Tensor:
    """Return the map of one image and head, or the mean of all heads; ``missing`` if there is none of its shape.

    Args:
        snapshot: The snapshot.
        role: Role of the model.
        layer: Layer; a negative one counts from the last.
        image: Index of the probe image.
        head: Index of the head, or None for the mean.
        missing: Map to return instead, (gh, gw).
    """
    if not has_layer(snapshot, role, layer) or image >= len(snapshot.names):
        return missing
    maps = snapshot.maps(role, layer)[image]
    if maps.shape[1:] != missing.shape or (head is not None and head >= len(maps)):
        return missing
    return maps.mean(0) if head is None else maps[head]
