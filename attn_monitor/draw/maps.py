"""The maps that pictures show, and what is said of them: chosen from snapshots, measured as the metrics are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.snapshot import Snapshot

PRACTICALLY_UNIFORM = 0.995
"""Entropy above which attention is written as 1.00 and gets no outline: which patches are largest is noise."""


@dataclass(frozen=True)
class MapStatistics:
    """What is said of maps (..., gh, gw): the numbers of `attn_monitor.functional`, as the metrics have them.

    ``entropy`` and ``mask_area`` are (...), NaN where a map has none. ``mask`` is what is outlined, bool
    (..., gh, gw): the mass mask, empty where attention is practically uniform.
    """

    entropy: Tensor
    mask_area: Tensor
    mask: Tensor


def map_statistics(maps: Tensor, threshold: float) -> MapStatistics:
    """Statistics of maps (..., gh, gw), with a mask that holds the share ``threshold`` of attention."""
    flat = maps.flatten(-2)
    entropy, mask = F.entropy(flat), F.mass_mask(flat, threshold)
    outlined = mask & (entropy <= PRACTICALLY_UNIFORM)[..., None]
    return MapStatistics(entropy, F.area_of(mask, flat), outlined.unflatten(-1, maps.shape[-2:]))


def map_captions(labels: Sequence[str], maps: Tensor, said: MapStatistics) -> list[str]:
    """What stands below maps (M, gh, gw): label, entropy, and the mask's area where it is outlined."""
    finite = maps.isfinite().all(-1).all(-1).tolist()
    numbers = zip(labels, said.entropy.tolist(), said.mask_area.tolist(), finite, strict=True)
    return [" · ".join(filter(None, (label, _numbers(*values)))) for label, *values in numbers]


def _numbers(entropy: float, mask_area: float, finite: bool) -> str:
    if not finite:
        return "missing"
    if math.isnan(entropy):
        return ""  # signed weights have neither entropy nor mask
    return f"H {entropy:.2f} · " + ("uniform" if entropy > PRACTICALLY_UNIFORM else f"{mask_area:.0%}")


def mean_and_heads(maps: Tensor, heads: tuple[int, ...] | None) -> tuple[Tensor, list[str]]:
    """The mean of an image's maps (H, gh, gw) before those of some heads, (1 + heads, gh, gw), and labels of them."""
    shown = [h for h in (range(len(maps)) if heads is None else heads) if h < len(maps)]
    return torch.cat([maps.mean(0, keepdim=True), maps[shown]]), ["mean", *(f"head {h}" for h in shown)]


def has_layer(snapshot: Snapshot, role: str, layer: int) -> bool:
    """Whether a role's layer was captured; negative ones count from the last."""
    captured = snapshot.layers_of(role)
    return layer in captured or (layer < 0 and -layer <= len(captured))


def colors_or_missing(snapshot: Snapshot, role: str, layer: int, image: int, missing: Tensor) -> Tensor:
    """An image's patches as colours (gh, gw, 3); ``missing`` where there are none of its shape."""
    if not has_layer(snapshot, role, layer) or image >= len(snapshot.names):
        return missing
    attention = snapshot.layer(role, layer)
    if attention.colors is None or attention.grid != tuple(missing.shape[:2]):
        return missing
    colors: Tensor = attention.colors[image].unflatten(0, attention.grid)
    return colors


def map_or_missing(snapshot: Snapshot, role: str, layer: int, image: int, head: int | None, missing: Tensor) -> Tensor:
    """A head's map of one image, or the mean of all heads (None); ``missing`` where there is none of its shape."""
    if not has_layer(snapshot, role, layer) or image >= len(snapshot.names):
        return missing
    maps = snapshot.maps(role, layer)[image]
    if maps.shape[1:] != missing.shape or (head is not None and head >= len(maps)):
        return missing
    return maps.mean(0) if head is None else maps[head]
