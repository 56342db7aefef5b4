"""Clips and volumes as the page shows them: for each image its mean, its maximum, and every frame or slice.

Each of these is one picture, and numbered like an image: picture p of image i has the index i · pictures + p.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention, PatchColors
from attn_monitor.draw.slices import has_slices, middle_frame, slice_word
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.snapshot import Snapshot


def slice_names(snapshot: Snapshot) -> list[str]:
    """Names of the pictures of one image: "mean", "maximum", then each frame or slice; none for images of two axes."""
    sliced = [a for a in snapshot.layers.values() if has_slices(a)]
    if not sliced:
        return []
    most = max(sliced, key=lambda a: a.grid[0])
    depth, word = most.grid[0], slice_word(most)
    return [f"mean of {depth}", "maximum", *(f"{word} {n}" for n in range(depth))]


def in_slices(snapshot: Snapshot, pictures: int) -> Snapshot:
    """Return layers of two axes with ``pictures`` pictures of each image; 0 for one of each.

    Weights are on the scale of all frames or slices together, so that 1 / (rows × columns) is uniform in each of them.
    """
    if not pictures:
        return snapshot.in_plane()
    return replace(snapshot, layers={key: _in_slices(layer, pictures) for key, layer in snapshot.layers.items()})


def _in_slices(attention: LayerAttention, pictures: int) -> LayerAttention:
    flat, count = attention.in_plane(), pictures - 2
    rgb = None if flat.colors is None else flat.colors[:, None].expand(-1, pictures, -1, -1)
    if len(attention.grid) != 3:
        rows = flat.rows[:, None].expand(-1, pictures, -1, -1)
    else:
        depth = attention.grid[0]
        shown = torch.arange(count, device="cpu") * depth // count
        slices = attention.maps.movedim(2, 1).flatten(-2) * depth  # (B, depth, H, rows · columns)
        maps = torch.cat([slices.mean(1, keepdim=True), slices.amax(1, keepdim=True), slices[:, shown]], 1)
        prefix = attention.rows[:, None, :, : attention.num_prefix].expand(-1, pictures, -1, -1)
        rows = torch.cat([prefix, maps], -1)
        if attention.colors is not None and rgb is not None:
            of_slices = attention.colors.unflatten(1, (depth, -1))[:, shown]
            rgb = torch.cat([rgb[:, :2], of_slices], 1)
    colors = (
        None if rgb is None or flat.patch_colors is None else PatchColors(rgb.flatten(0, 1), flat.patch_colors.scale)
    )
    return replace(flat.with_tensors({"rows": rows.flatten(0, 1)}), patch_colors=colors)


def pixels_of(probe: ProbeBatch, pictures: int) -> np.ndarray[Any, Any]:
    """Photographs of all pictures, uint8 (images · pictures, H, W, 3): of several frames in a slice the middle one.

    Where the slices of a map are groups of channels, each of them has the photograph itself.
    """
    if not pictures:
        return probe.pixels
    if probe.channels_first.ndim < 5:
        return probe.pixels.repeat(pictures, 0)
    frames = probe.frames  # (B, T, H, W, 3)
    count = pictures - 2
    middle = [middle_frame(n, count, frames.shape[1]) for n in range(count)]
    largest = frames.max(1) if probe.image_axes.spatial[0] == "d" else probe.pixels
    found = np.concatenate([probe.pixels[:, None], largest[:, None], frames[:, middle]], 1)
    return found.reshape(-1, *found.shape[2:])


def masks_of(probe: ProbeBatch, pictures: int) -> Tensor | None:
    """Ground truth of all pictures, bool (images · pictures, objects, H, W); None without any."""
    if probe.masks is None or not pictures:
        return None if probe.masks is None else probe.plane_masks
    if probe.masks.ndim < 5:
        return probe.plane_masks.repeat_interleave(pictures, 0)
    whole = probe.plane_masks[:, None].expand(-1, 2, -1, -1, -1)
    count = pictures - 2
    middle = [middle_frame(n, count, probe.masks.shape[2]) for n in range(count)]
    return torch.cat([whole, probe.masks[:, :, middle].movedim(2, 1)], 1).flatten(0, 1)
