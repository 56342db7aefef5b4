"""Attention over a photograph: the cells that panels, film strips and time-lapses are put together from."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from attn_monitor.draw.canvas import BLOCK, MASK, MISSING, TRUTH, Array, Pixels, draw_outline, resize
from attn_monitor.draw.colormap import colour_table
from attn_monitor.draw.frame import Frame
from attn_monitor.draw.hatching import hatch, unseen_picture
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.scales import GREY, OPACITY, SCALES
from attn_monitor.grid import Grid

DOUBLE_OUTLINE = 160  # side of a cell in pixels from which on ground truth is outlined with two


class CellPainter:
    """Paints maps of one image: holds its photograph at the size of a cell, in colour and in grey.

    ``photo`` is uint8 (H, W, 3), ``grid`` the patches of a map, ``side`` the wanted side of a cell in pixels and
    ``truth`` ground-truth objects, bool (objects, H, W), which are outlined on every cell. What no patch sees is dark
    and hatched.
    """

    def __init__(
        self,
        photo: Pixels,
        grid: tuple[int, ...],
        options: DrawingOptions,
        side: int,
        truth: Array | None = None,
    ) -> None:
        self.grid, self.options = Grid(grid), options
        self.frame = Frame.of(self.grid, side, (photo.shape[0], photo.shape[1]))
        self.size = self.frame.size
        self.photo = resize(photo, self.size, Image.Resampling.LANCZOS).copy()
        # A little soft: the photograph is there to place the attention, and sharp texture fills the event file.
        grey = Image.fromarray(self.photo).convert("L").filter(ImageFilter.GaussianBlur(max(self.size) / 180))
        self.grey: Array = np.asarray(grey, dtype=np.float32)
        self.unseen = unseen_picture(self.grey)
        objects = [(mask * np.uint8(255)).astype(np.uint8) for mask in truth if mask.any()] if truth is not None else []
        self.truth = [resize(mask, self.size, Image.Resampling.NEAREST) > 0 for mask in objects]
        self._outline_truth(self.photo)

    def paint(self, maps: Array, masks: Array | None = None, hatched: Array | None = None) -> Pixels:
        """(..., gh, gw) maps, with outlines of their mass masks if given, to (..., h, w, 3) pictures.

        ``hatched`` are patches, bool (gh, gw), of which nothing is shown.
        """
        below = self.frame.cut(self.grey)
        pictures = overlay(maps, below, scale=self.options.scale, colormap=self.options.colormap)
        pictures = self.put(pictures)
        self._outline_truth(pictures)
        if masks is not None:
            width = 2 if self.frame.patch >= BLOCK else 1
            draw_outline(pictures, self.frame.enlarge(masks[..., None])[..., 0], MASK, width)
        if hatched is not None:
            hatch(pictures, self.frame.enlarge(hatched[..., None])[..., 0], self.frame.patch)
        return pictures

    def put(self, pictures: Pixels) -> Pixels:
        """Pictures of the patches alone, (..., gh · patch, gw · patch, 3), in their place in the photograph."""
        return self.frame.put(pictures, self.unseen)

    def colors(self, colors: Array) -> Pixels:
        """Colours of patches (gh, gw, 3) in 0…1 as a picture, (h, w, 3); patches stay squares."""
        patches, side = (colors * 255).round().astype(np.uint8), self.frame.patch
        return self.put(patches.repeat(side, 0).repeat(side, 1))

    def _outline_truth(self, pictures: Pixels) -> None:
        width = 2 if max(self.size) >= DOUBLE_OUTLINE else 1
        union = np.zeros(self.size, dtype=bool)
        for mask in reversed(self.truth):
            union = union | mask  # so that the border that two objects share is drawn once
            draw_outline(pictures, np.broadcast_to(union, pictures.shape[:-1]), TRUTH, width)


def overlay(maps: Array, grey: Array, *, scale: str = "uniform", colormap: str = "inferno") -> Pixels:
    """Colour maps (..., gh, gw) over a grey photograph (h, w); patches stay squares. Returns (..., h, w, 3).

    Where a map is not finite, the whole cell is dull red: missing, never zero.
    """
    finite = np.isfinite(maps).all((-2, -1))
    pictures = blend(SCALES[scale].position(np.nan_to_num(maps, posinf=0, neginf=0)), grey, colormap)
    pictures[~finite] = MISSING
    return pictures


def blend(level: Array, grey: Array, colormap: str) -> Pixels:
    """Positions 0…1 on a colour scale (..., gh, gw) over a grey photograph (h, w): (..., h, w, 3)."""
    # Colours are constant within a patch: one row of pixels, 3 · w values, is computed for each row of patches.
    (gh, gw), (height, width), level = level.shape[-2:], grey.shape, level.astype(np.float32)
    opacity = OPACITY[0] + (OPACITY[1] - OPACITY[0]) * level
    table = colour_table(colormap)
    colour = opacity[..., None] * table[(level * 255).astype(np.uint8)] + np.float32(0.5)  # to be rounded down
    colour = colour.repeat(width // gw, -2).reshape(*level.shape[:-1], 1, 3 * width)
    through = ((1 - opacity) * np.float32(GREY)).repeat(3 * (width // gw), -1)[..., None, :]
    below = grey.astype(np.float32).repeat(3, -1).reshape(gh, height // gh, 3 * width)
    pictures: Pixels = (through * below + colour).astype(np.uint8).reshape(*level.shape[:-2], height, width, 3)
    return pictures
