"""Clips and volumes as the page shows them: for each image its mean, its maximum, and every frame or slice.

Each of these is one picture, and numbered like an image: picture p of image i has the index i · pictures + p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention, PatchColors
from attn_monitor.draw.slices import has_slices, middle_frame, slice_name
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.snapshot import Snapshot


class Pictures(NamedTuple):
    """The pictures of one image: their mean, their maximum, then each frame or slice; none for images of two axes.

    Attributes:
        names: What they show, such as "frames 6-7".
        frames: The frame or slice of the image that lies below each but the first two.
    """

    names: Sequence[str] = ()
    frames: Sequence[int] = ()


NO_SLICES = Pictures()


def pictures_of(snapshot: Snapshot, probe: ProbeBatch) -> Pictures:
    """Return the pictures of one image, of the layer with the most frames or slices."""
    sliced = [a for a in snapshot.layers.values() if has_slices(a)]
    if not sliced:
        return NO_SLICES
    most = max(sliced, key=lambda a: a.grid[0])
    images, depth = probe.channels_first, most.grid[0]
    frames = images.shape[2] if images.ndim == 5 else None
    names = [f"mean of {frames or depth}", "maximum", *(slice_name(most, n, frames) for n in range(depth))]
    return Pictures(names, [] if frames is None else [middle_frame(most.grid, n, frames) for n in range(depth)])


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


def pixels_of(probe: ProbeBatch, pictures: Pictures) -> np.ndarray[Any, Any]:
    """Photographs of all pictures, uint8 (images · pictures, H, W, 3): of several frames in a slice the middle one.

    Where the slices of a map are groups of channels, each of them has the photograph itself.
    """
    if not pictures.names:
        return probe.pixels
    if not pictures.frames:
        return probe.pixels.repeat(len(pictures.names), 0)
    frames = probe.frames  # (B, T, H, W, 3)
    largest = frames.max(1) if probe.image_axes.spatial[0] == "d" else probe.pixels
    found = np.concatenate([probe.pixels[:, None], largest[:, None], frames[:, list(pictures.frames)]], 1)
    return found.reshape(-1, *found.shape[2:])


def masks_of(probe: ProbeBatch, pictures: Pictures) -> Tensor | None:
    """Ground truth of all pictures, bool (images · pictures, objects, H, W); None without any."""
    if probe.masks is None or not pictures.names:
        return None if probe.masks is None else probe.plane_masks
    if not pictures.frames:
        return probe.plane_masks.repeat_interleave(len(pictures.names), 0)
    whole = probe.plane_masks[:, None].expand(-1, 2, -1, -1, -1)
    return torch.cat([whole, probe.masks[:, :, list(pictures.frames)].movedim(2, 1)], 1).flatten(0, 1)
