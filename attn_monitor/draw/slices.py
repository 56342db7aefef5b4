"""Frames of clips and slices of volumes side by side, behind the maximum over all of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.draw.canvas import Pixels
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.maps import map_statistics
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.grid import Grid
from attn_monitor.record.thinning import thin

WORDS = {"t": "frame", "d": "slice", "c": "channel group"}
MOST = 14  # frames or slices in a panel, evenly spaced


def has_slices(attention: LayerAttention) -> bool:
    """Return whether a layer's grid has several frames or slices."""
    return len(attention.grid) == 3 and attention.grid[0] > 1


def slice_word(attention: LayerAttention) -> str:
    """Return what the grid's first axis counts: "frame", "slice", or its name."""
    return WORDS.get(attention.grid.axes[0], attention.grid.axes[0])


def frames_of(grid: Grid, number: int, frames: int) -> range:
    """Return the frames, of so many, that patches of a slice of the grid take."""
    start, end = _span(grid, number, frames)
    first = min(max(math.floor(start + 1e-6), 0), frames - 1)
    return range(first, min(max(math.ceil(end - 1e-6), first + 1), frames))


def middle_frame(grid: Grid, number: int, frames: int) -> int:
    """Return the frame in the middle of those that patches of a slice of the grid take."""
    start, end = _span(grid, number, frames)
    return min(max(math.floor((start + end) / 2 + 1e-6), 0), frames - 1)


def _span(grid: Grid, number: int, frames: int) -> tuple[float, float]:
    start, cell = (0.0, frames / grid[0]) if grid.geometry is None else (grid.geometry.origin[0], grid.geometry.cell[0])
    return start + number * cell, start + (number + 1) * cell


def slice_name(attention: LayerAttention, number: int, frames: int | None) -> str:
    """Return what a slice of the grid holds, such as "frames 6-7" of so many; its own number without them."""
    word = slice_word(attention)
    taken = range(number, number + 1) if frames is None else frames_of(attention.grid, number, frames)
    return f"{word} {taken[0]}" if len(taken) == 1 else f"{word}s {taken[0]}-{taken[-1]}"


def shown_slices(attention: LayerAttention) -> list[int]:
    """Return the frames or slices that a panel shows."""
    return thin(list(range(attention.grid[0])), MOST) if has_slices(attention) else []


def mean_in_slices(attention: LayerAttention, image: int, options: DrawingOptions) -> tuple[Tensor, Tensor]:
    """Return the mean of heads of an image, (slices, rows, columns), and its mask, which holds its share of all slices.

    Weights are in units of those of all slices; the mask is empty where attention is practically uniform.
    """
    maps = attention.maps[image].mean(0)
    mask = map_statistics(maps.flatten()[None, None], options.threshold).mask.view_as(maps)
    return maps * attention.grid[0], mask


def slice_cells(
    attention: LayerAttention, image: int, photo: Pixels, frames: Pixels | None, options: DrawingOptions, side: int
) -> list[tuple[str, Pixels]]:
    """Paint the mean of heads in each frame or slice, with its share of the attention on patches.

    Weights are in units of uniform attention over all of them, and the outlined mask holds its share of all.

    Args:
        attention: A layer with a grid of three axes.
        image: Index of the image.
        photo: The image, uint8 (H, W, 3).
        frames: Its frames, uint8 (frames, H, W, 3); the photo is below every one without them.
        options: Colours of the maps.
        side: Approximate longer side of a cell in pixels.

    Returns:
        Captions and pictures, the maximum first.
    """
    depth, flat = attention.grid[0], attention.in_plane().grid
    maps, mask = mean_in_slices(attention, image, options)
    shares = (maps.flatten(1).sum(1) / maps.sum()).tolist()
    painter = CellPainter(photo, flat, options, side)
    count = None if frames is None else len(frames)
    cells = [(f"maximum of {count or depth} {slice_word(attention)}s", painter.paint(maps.amax(0).numpy()))]
    for number in shown_slices(attention):
        if frames is not None:
            below = np.ascontiguousarray(frames[middle_frame(attention.grid, number, len(frames))])
            painter = CellPainter(below, flat, options, side)
        share = f" · {shares[number]:.0%}" if attention.kind != "signed" and torch.isfinite(maps).all() else ""
        picture = painter.paint(maps[number].numpy(), mask[number].numpy())
        cells.append((f"{slice_name(attention, number, count)}{share}", picture))
    return cells


def slice_photo(frames: Pixels | None, photo: Pixels, attention: LayerAttention, options: DrawingOptions) -> Pixels:
    """Return the frame below the slice that the options choose; the photo where they choose none."""
    if frames is None or options.slice is None or not has_slices(attention):
        return photo
    number = min(options.slice, attention.grid[0] - 1)
    return np.ascontiguousarray(frames[middle_frame(attention.grid, number, len(frames))])
