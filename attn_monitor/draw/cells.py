"""Attention over a photograph: the cells of panels, film strips and time-lapses."""

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

DOUBLE_OUTLINE = 160  # side of a cell in pixels from which on the outline of ground truth is two pixels wide


class CellPainter:
    """Paint maps of one image over its photograph; parts that no patch covers are dark and hatched.

    Args:
        photo: The image, uint8 (H, W, 3).
        grid: Patches of a map.
        options: Colours of the maps.
        side: Approximate longer side of a cell in pixels.
        truth: Ground-truth objects, bool (objects, H, W), which are outlined on every cell.
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
        # Blurred a little: the photograph only locates the attention, and sharp texture fills the event file.
        grey = Image.fromarray(self.photo).convert("L").filter(ImageFilter.GaussianBlur(max(self.size) / 180))
        self.grey: Array = np.asarray(grey, dtype=np.float32)
        self.unseen = unseen_picture(self.grey, self.frame.seen((photo.shape[0], photo.shape[1])))
        objects = [(mask * np.uint8(255)).astype(np.uint8) for mask in truth if mask.any()] if truth is not None else []
        self.truth = [resize(mask, self.size, Image.Resampling.NEAREST) > 0 for mask in objects]
        self._outline_truth(self.photo)

    def paint(self, maps: Array, masks: Array | None = None, hatched: Array | None = None) -> Pixels:
        """Paint maps (..., gh, gw) as pictures (..., h, w, 3).

        Args:
            maps: Attention weights.
            masks: Mass masks to outline, bool (..., gh, gw).
            hatched: Patches to hatch instead, bool (gh, gw).
        """
        below = self.frame.cut(self.grey)
        pictures = overlay(maps, below, scale=self.options.scale, colormap=self.options.colormap)
        pictures = self.put(pictures)
        self._outline_truth(pictures)
        if masks is not None:
            width = 2 if min(self.frame.patch) >= BLOCK else 1
            draw_outline(pictures, self.frame.enlarge(masks[..., None])[..., 0], MASK, width)
        if hatched is not None:
            hatch(pictures, self.frame.enlarge(hatched[..., None])[..., 0], min(self.frame.patch))
        return pictures

    def put(self, pictures: Pixels) -> Pixels:
        """Place pictures of the patches alone, (..., gh · patch, gw · patch, 3), in the photograph."""
        return self.frame.put(pictures, self.unseen)

    def colors(self, colors: Array) -> Pixels:
        """Paint each patch in its colour, (gh, gw, 3) in 0 to 1, as a picture (h, w, 3)."""
        patches, (height, width) = (colors * 255).round().astype(np.uint8), self.frame.patch
        return self.put(patches.repeat(height, 0).repeat(width, 1))

    def _outline_truth(self, pictures: Pixels) -> None:
        width = 2 if max(self.size) >= DOUBLE_OUTLINE else 1
        union = np.zeros(self.size, dtype=bool)
        for mask in reversed(self.truth):
            union = union | mask  # so that a border between two objects is drawn once
            draw_outline(pictures, np.broadcast_to(union, pictures.shape[:-1]), TRUTH, width)


def overlay(maps: Array, grey: Array, *, scale: str = "uniform", colormap: str = "inferno") -> Pixels:
    """Colour maps (..., gh, gw) over a grey photograph (h, w), without smoothing. Returns (..., h, w, 3).

    A map that is not finite is painted dull red as a whole: missing, never zero.
    """
    finite = np.isfinite(maps).all((-2, -1))
    pictures = blend(SCALES[scale].position(np.nan_to_num(maps, posinf=0, neginf=0)), grey, colormap)
    pictures[~finite] = MISSING
    return pictures


def blend(level: Array, grey: Array, colormap: str) -> Pixels:
    """Blend positions on a colour scale, 0 to 1, (..., gh, gw), with a grey photograph (h, w): (..., h, w, 3)."""
    # Colours are constant within a patch row: compute one row of pixels, 3 · w values, and broadcast it.
    (gh, gw), (height, width), level = level.shape[-2:], grey.shape, level.astype(np.float32)
    opacity = OPACITY[0] + (OPACITY[1] - OPACITY[0]) * level
    table = colour_table(colormap)
    colour = opacity[..., None] * table[(level * 255).astype(np.uint8)] + np.float32(0.5)  # truncated below
    colour = colour.repeat(width // gw, -2).reshape(*level.shape[:-1], 1, 3 * width)
    through = ((1 - opacity) * np.float32(GREY)).repeat(3 * (width // gw), -1)[..., None, :]
    below = grey.astype(np.float32).repeat(3, -1).reshape(gh, height // gh, 3 * width)
    pictures: Pixels = (through * below + colour).astype(np.uint8).reshape(*level.shape[:-2], height, width, 3)
    return pictures
