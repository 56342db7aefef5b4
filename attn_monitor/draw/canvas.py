"""The parts that pictures are made of: attention over a photograph, outlines, text, the legend, encoding.

Sizes are multiples of 8 wherever possible, the block size of JPEG: a patch that fills whole blocks costs a few bytes,
one that straddles them costs many.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from attn_monitor.draw.colormap import colour_table

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Array = np.ndarray[Any, Any]

LOW, HIGH = -1.0, 5.0  # log2 of the colour scale's ends: half of uniform to 32 times uniform
SCALES = ("uniform", "minmax")

BACKGROUND = (18, 18, 22)
TEXT, DIM = (236, 236, 240), (150, 150, 160)
MASK, TRUTH, MISSING = (64, 224, 255), (120, 255, 80), (90, 30, 30)
BLOCK = 8
GAP, LINE = BLOCK, 2 * BLOCK  # between cells, and for a line of text
LEGEND = 6 * BLOCK
TWO_PIXELS = 160  # side of a cell from which on ground truth is outlined with two pixels


@dataclass(frozen=True)
class Style:
    """How pictures are drawn: mask ``threshold``, colour ``scale`` ("uniform" or "minmax"), ``heads`` (None: all).

    ``cell`` is the side of a map in pixels, about; None makes few maps large and many small.
    """

    threshold: float = 0.6
    scale: str = "uniform"
    heads: tuple[int, ...] | None = None
    cell: int | None = None

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f'scale={self.scale!r}: expected "uniform" (fixed, comparable) or "minmax" (DINO\'s look)')


@functools.lru_cache(maxsize=8)
def font(size: int) -> Any:
    """Pillow's own scalable font."""
    return ImageFont.load_default(size)


def cell_size(grid: tuple[int, int], target: int) -> tuple[int, int]:
    """Height and width in pixels of a map near the target size, in which each patch is a square of 2ⁿ pixels."""
    patch: int = 2 ** max(0, round(math.log2(target / max(grid))))
    return grid[0] * patch, grid[1] * patch


def up_to_block(length: int) -> int:
    """The next multiple of 8."""
    return -(-length // BLOCK) * BLOCK


def intensity(maps: Array, scale: str) -> Array:
    """Position on the colour scale, 0…1, of weights (..., gh, gw)."""
    if scale == "minmax":
        low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
        return np.asarray((maps - low) / np.maximum(high - low, 1e-12))
    units = maps * (maps.shape[-1] * maps.shape[-2])
    return np.asarray(np.clip((np.log2(np.maximum(units, 1e-12)) - LOW) / (HIGH - LOW), 0, 1))


def overlay(maps: Array, grey: Array, *, scale: str = "uniform") -> Pixels:
    """Colour maps (..., gh, gw) over a grey photograph (h, w); patches stay squares. Returns (..., h, w, 3).

    Where a map is not finite, the whole cell is dull red: missing, never zero.
    """
    finite = np.isfinite(maps).all((-2, -1))
    level = intensity(np.nan_to_num(maps, posinf=0, neginf=0), scale).astype(np.float32)
    # All that is the same down a patch is computed once for it, and the rest along whole rows of pixels, 3 · w values.
    (gh, gw), (height, width) = maps.shape[-2:], grey.shape
    opacity = 0.45 + 0.5 * level
    colour = opacity[..., None] * colour_table("inferno")[(level * 255).astype(np.uint8)] + np.float32(
        0.5
    )  # to be rounded down
    colour = colour.repeat(width // gw, -2).reshape(*maps.shape[:-1], 1, 3 * width)
    through = ((1 - opacity) * np.float32(0.62)).repeat(3 * (width // gw), -1)[..., None, :]
    below = grey.astype(np.float32).repeat(3, -1).reshape(gh, height // gh, 3 * width)
    pictures: Pixels = (through * below + colour).astype(np.uint8).reshape(*maps.shape[:-2], height, width, 3)
    pictures[~finite] = MISSING
    return pictures


def enlarge(maps: Array, size: tuple[int, ...]) -> Array:
    """Repeat each patch of (..., gh, gw, channels) to (..., h, w, channels)."""
    return maps.repeat(size[0] // maps.shape[-3], -3).repeat(size[1] // maps.shape[-2], -2)


def outline(picture: Pixels, mask: Array, colour: tuple[int, int, int], width: int = 1) -> None:
    """Draw the inner border of bool masks (..., h, w) onto pictures (..., h, w, 3), in place."""
    inside, (height, breadth) = mask, mask.shape[-2:]
    for _ in range(width):
        around = np.pad(inside, [(0, 0)] * (mask.ndim - 2) + [(1, 1), (1, 1)])
        inside = inside & around[..., :height, 1:-1] & around[..., 2:, 1:-1]
        inside &= around[..., 1:-1, :breadth] & around[..., 1:-1, 2:]
    picture[mask & ~inside] = colour


def resize(photo: Pixels, size: tuple[int, int], resample: Image.Resampling) -> Pixels:
    """A picture (h, w) or (h, w, 3) in another size."""
    return np.asarray(Image.fromarray(photo).resize((size[1], size[0]), resample))


class Cells:
    """Draws maps of one image: holds its photograph at the size of a cell, in colour and in grey."""

    def __init__(self, photo: Pixels, grid: tuple[int, int], style: Style, target: int, truth: Array | None = None):
        self.grid, self.style = grid, style
        self.size = cell_size(grid, target)
        self.photo = resize(photo, self.size, Image.Resampling.LANCZOS).copy()
        # A little soft: the photograph is there to place the attention, and sharp texture fills the event file.
        grey = Image.fromarray(self.photo).convert("L").filter(ImageFilter.GaussianBlur(max(self.size) / 180))
        self.grey: Array = np.asarray(grey, dtype=np.float32)
        objects = [(mask * np.uint8(255)).astype(np.uint8) for mask in truth if mask.any()] if truth is not None else []
        self.truth = [resize(mask, self.size, Image.Resampling.NEAREST) > 0 for mask in objects]
        self._outline_truth(self.photo)

    def _outline_truth(self, pictures: Pixels) -> None:
        width = 2 if max(self.size) >= TWO_PIXELS else 1
        together = np.zeros(self.size, dtype=bool)
        for mask in reversed(self.truth):
            together = together | mask  # so that the border that two objects share is drawn once
            outline(pictures, np.broadcast_to(together, pictures.shape[:-1]), TRUTH, width)

    def draw(self, maps: Array, masks: Array | None = None) -> Pixels:
        """(..., gh, gw) maps, with outlines of their mass masks if given, to (..., h, w, 3) pictures."""
        pictures = overlay(maps, self.grey, scale=self.style.scale)
        self._outline_truth(pictures)
        if masks is not None:
            width = 2 if self.size[0] // self.grid[0] >= BLOCK else 1
            outline(pictures, enlarge(masks[..., None], self.size)[..., 0], MASK, width)
        return pictures


@functools.lru_cache(maxsize=4096)
def _word(text: str, size: int) -> tuple[Image.Image, float]:
    """A word's coverage in 0…255, from the top of its line, and how far it advances."""
    used = font(size)
    _, _, right, bottom = used.getbbox(text)
    mask = Image.new("L", (max(1, math.ceil(right)), max(1, math.ceil(bottom))))
    ImageDraw.Draw(mask).text((0, 0), text, 255, used)
    return mask, float(used.getlength(text))


def text_width(text: str, size: int) -> float:
    """Width in pixels of a line of text."""
    words = text.split(" ")
    return sum(_word(word, size)[1] for word in words) + (len(words) - 1) * _word(" ", size)[1]


def put(
    canvas: Image.Image,
    at: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    size: int,
    anchor: str = "l",
) -> None:
    """A line of text whose left end ("l"), middle ("m") or right end ("r") is at this place.

    Word by word from those that have been drawn before: captions are made of the same few words and numbers again
    and again, and letters take longer to draw than maps.
    """
    x = at[0] - {"l": 0.0, "m": 0.5, "r": 1.0}[anchor] * text_width(text, size)
    for word in text.split(" "):
        mask, advance = _word(word, size)
        canvas.paste(colour, (round(x), round(at[1])), mask)
        x += advance + _word(" ", size)[1]


def write(
    canvas: Image.Image,
    at: tuple[float, float],
    text: str,
    width: float,
    largest: int = 13,
    colour: tuple[int, int, int] = TEXT,
) -> None:
    """A line of text in the largest size that fits the width."""
    size = next((s for s in range(largest, 8, -1) if text_width(text, s) <= width), 8)
    put(canvas, at, text, colour, size)


def blank(width: int, height: int) -> Pixels:
    """A picture of nothing but background."""
    return np.array(Image.new("RGB", (width, height), BACKGROUND))


def paste(canvas: Pixels, x: int, y: int, picture: Pixels) -> None:
    """Put a picture onto another, at the pixel of its upper left corner, in place."""
    height, width = picture.shape[:2]
    canvas[y : y + height, x : x + width] = picture


def short(step: int) -> str:
    """A step in at most five characters or so: 950, 12,500, 1.25M."""
    if step < 100_000:
        return f"{step:,}"
    return f"{step / 1000:.0f}k" if step < 1_000_000 else f"{step / 1_000_000:.3g}M"


def legend(
    canvas: Image.Image,
    top: int,
    style: Style,
    *,
    masks: bool = True,
    truth: bool = False,
    large: int = 0,
) -> None:
    """Colour bar in units of uniform attention, and what the outlines are; ``large`` adds to the size of the text."""
    bar = min(240, canvas.width // 3)
    table = colour_table("inferno")[np.linspace(0, 255, bar).astype(np.uint8)]
    canvas.paste(Image.fromarray(np.broadcast_to(table, (10, bar, 3)).copy()), (GAP, top))
    ticks = ["0.5", "1", "2", "4", "8", "16", "32"] if style.scale == "uniform" else ["min", "max"]
    for index, tick in enumerate(ticks):
        x = GAP + index * (bar - 1) / (len(ticks) - 1)
        anchor = "l" if index == 0 else "r" if index == len(ticks) - 1 else "m"
        put(canvas, (x, top + 12), tick, DIM, 12 + large, anchor)
    x = GAP * 3 + bar
    unit = "x uniform attention" if style.scale == "uniform" else "each map for itself"
    put(canvas, (x, top - 4), unit, DIM, 13 + large)
    keys = [(MASK, f"top {style.threshold:.0%} of attention (area in %)")] * masks + [(TRUTH, "ground truth")] * truth
    draw, below = ImageDraw.Draw(canvas), top + 12 + large
    for colour, text in keys:
        draw.rectangle((x, below + 4 + large // 2, x + 11, below + 15 + large // 2), outline=colour, width=2)
        put(canvas, (x + 18, below), text, DIM, 13 + large)
        x += 36 + int(text_width(text, 13 + large))


def jpeg(picture: Pixels, quality: int = 65) -> bytes:
    """JPEG without chroma subsampling, which would blur outlines and text."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()


def gif(frames: Iterable[Pixels], seconds: float = 0.4) -> bytes:
    """An endless animation of pictures of one size, holding its last frame longer."""
    images = [Image.fromarray(f).quantize(128) for f in frames]
    durations = [int(seconds * 1000)] * (len(images) - 1) + [int(seconds * 4000)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return buffer.getvalue()
