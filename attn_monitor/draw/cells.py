"""Attention over a photograph: the cells that panels, film strips and time-lapses are put together from."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

from attn_monitor.draw.canvas import BLOCK, MASK, MISSING, TRUTH, Array, Pixels, draw_outline, resize
from attn_monitor.draw.colormap import colour_table
from attn_monitor.draw.hatching import hatch
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.scales import SCALES

DOUBLE_OUTLINE = 160  # side of a cell in pixels from which on ground truth is outlined with two


class CellPainter:
    """Paints maps of one image: holds its photograph at the size of a cell, in colour and in grey.

    ``photo`` is uint8 (H, W, 3), ``grid`` the patches of a map, ``side`` the wanted side of a cell in pixels and
    ``truth`` ground-truth objects, bool (objects, H, W), which are outlined on every cell.
    """

    def __init__(
        self,
        photo: Pixels,
        grid: tuple[int, int],
        options: DrawingOptions,
        side: int,
        truth: Array | None = None,
    ) -> None:
        self.grid, self.options = grid, options
        self.size = cell_size(grid, side)
        self.photo = resize(photo, self.size, Image.Resampling.LANCZOS).copy()
        # A little soft: the photograph is there to place the attention, and sharp texture fills the event file.
        grey = Image.fromarray(self.photo).convert("L").filter(ImageFilter.GaussianBlur(max(self.size) / 180))
        self.grey: Array = np.asarray(grey, dtype=np.float32)
        objects = [(mask * np.uint8(255)).astype(np.uint8) for mask in truth if mask.any()] if truth is not None else []
        self.truth = [resize(mask, self.size, Image.Resampling.NEAREST) > 0 for mask in objects]
        self._outline_truth(self.photo)

    def paint(self, maps: Array, masks: Array | None = None, hatched: Array | None = None) -> Pixels:
        """(..., gh, gw) maps, with outlines of their mass masks if given, to (..., h, w, 3) pictures.

        ``hatched`` are patches, bool (gh, gw), of which nothing is shown.
        """
        pictures = overlay(maps, self.grey, scale=self.options.scale, colormap=self.options.colormap)
        self._outline_truth(pictures)
        if masks is not None:
            width = 2 if self.size[0] // self.grid[0] >= BLOCK else 1
            draw_outline(pictures, enlarge(masks[..., None], self.size)[..., 0], MASK, width)
        if hatched is not None:
            hatch(pictures, hatched)
        return pictures

    def _outline_truth(self, pictures: Pixels) -> None:
        width = 2 if max(self.size) >= DOUBLE_OUTLINE else 1
        union = np.zeros(self.size, dtype=bool)
        for mask in reversed(self.truth):
            union = union | mask  # so that the border that two objects share is drawn once
            draw_outline(pictures, np.broadcast_to(union, pictures.shape[:-1]), TRUTH, width)


def color_cell(colors: Array, size: tuple[int, int]) -> Pixels:
    """Colours of patches (gh, gw, 3) in 0…1 as a picture, (h, w, 3); patches stay squares."""
    cell: Pixels = enlarge((colors * 255).round().astype(np.uint8), size)
    return cell


def cell_size(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width in pixels of a map whose longer side is near ``side``, each patch a square of 2ⁿ pixels."""
    patch: int = 2 ** max(0, round(math.log2(side / max(grid))))
    return grid[0] * patch, grid[1] * patch


def overlay(maps: Array, grey: Array, *, scale: str = "uniform", colormap: str = "inferno") -> Pixels:
    """Colour maps (..., gh, gw) over a grey photograph (h, w); patches stay squares. Returns (..., h, w, 3).

    Where a map is not finite, the whole cell is dull red: missing, never zero.
    """
    finite = np.isfinite(maps).all((-2, -1))
    level = SCALES[scale].position(np.nan_to_num(maps, posinf=0, neginf=0)).astype(np.float32)
    # All that is the same down a patch is computed once for it, and the rest along whole rows of pixels, 3 · w values.
    (gh, gw), (height, width) = maps.shape[-2:], grey.shape
    opacity = 0.45 + 0.5 * level
    table = colour_table(colormap)
    colour = opacity[..., None] * table[(level * 255).astype(np.uint8)] + np.float32(0.5)  # to be rounded down
    colour = colour.repeat(width // gw, -2).reshape(*maps.shape[:-1], 1, 3 * width)
    through = ((1 - opacity) * np.float32(0.62)).repeat(3 * (width // gw), -1)[..., None, :]
    below = grey.astype(np.float32).repeat(3, -1).reshape(gh, height // gh, 3 * width)
    pictures: Pixels = (through * below + colour).astype(np.uint8).reshape(*maps.shape[:-2], height, width, 3)
    pictures[~finite] = MISSING
    return pictures


def enlarge(maps: Array, size: tuple[int, ...]) -> Array:
    """Repeat each patch of (..., gh, gw, channels) to (..., h, w, channels)."""
    return maps.repeat(size[0] // maps.shape[-3], -3).repeat(size[1] // maps.shape[-2], -2)
