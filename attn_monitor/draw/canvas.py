"""Drawing primitives: text, outlines, resizing, pasting, encoding.

Sizes are multiples of 8 wherever possible, the block size of JPEG: a patch that fills whole blocks costs a few bytes,
one that straddles them costs many.
"""

from __future__ import annotations

import functools
import io
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Array = np.ndarray[Any, Any]
Colour = tuple[int, int, int]

BACKGROUND = (18, 18, 22)
TEXT, DIM_TEXT = (236, 236, 240), (150, 150, 160)
MASK, TRUTH, MISSING = (64, 224, 255), (120, 255, 80), (90, 30, 30)
BLOCK = 8
GAP, LINE = BLOCK, 2 * BLOCK  # space between cells, and height of a line of text
HEADER = 4 * BLOCK


def up_to_block(length: int) -> int:
    """Round up to a multiple of 8."""
    return -(-length // BLOCK) * BLOCK


def blank_picture(width: int, height: int) -> Pixels:
    """Return a picture of the background colour."""
    return np.array(Image.new("RGB", (width, height), BACKGROUND))


def paste(canvas: Pixels, x: int, y: int, picture: Pixels) -> None:
    """Copy a picture onto the canvas, its upper left corner at pixel (x, y), in place."""
    height, width = picture.shape[:2]
    canvas[y : y + height, x : x + width] = picture


def resize(photo: Pixels, size: tuple[int, int], resample: Image.Resampling) -> Pixels:
    """Resize a picture, (h, w) or (h, w, 3), to ``size``, (height, width)."""
    return np.asarray(Image.fromarray(photo).resize((size[1], size[0]), resample))


def draw_outline(picture: Pixels, mask: Array, colour: Colour, width: int = 1) -> None:
    """Draw the inner border of bool masks (..., h, w) onto pictures (..., h, w, 3), in place."""
    inside, (height, breadth) = mask, mask.shape[-2:]
    for _ in range(width):
        around = np.pad(inside, [(0, 0)] * (mask.ndim - 2) + [(1, 1), (1, 1)])
        inside = inside & around[..., :height, 1:-1] & around[..., 2:, 1:-1]
        inside &= around[..., 1:-1, :breadth] & around[..., 1:-1, 2:]
    picture[mask & ~inside] = colour


@functools.lru_cache(maxsize=8)
def _font(size: int) -> Any:
    """Return Pillow's own scalable font."""
    return ImageFont.load_default(size)


@functools.lru_cache(maxsize=4096)
def _drawable(character: str) -> str:
    """Return a character, or a plainer one for a character that Pillow's font lacks: x for ×, o for ö."""
    font = _font(16)
    if bytes(font.getmask(character)) != bytes(font.getmask("\ue000")):  # which no font has
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return {"×": "x", "−": "-", "–": "-"}.get(character, plain or character)


@functools.lru_cache(maxsize=4096)
def _rendered_word(word: str, size: int) -> tuple[Image.Image, float]:
    """Render a word: its coverage, 0 to 255, from the top of the line, and its advance width in pixels."""
    font, word = _font(size), "".join(map(_drawable, word))
    _, _, right, bottom = font.getbbox(word)
    coverage = Image.new("L", (max(1, math.ceil(right)), max(1, math.ceil(bottom))))
    ImageDraw.Draw(coverage).text((0, 0), word, 255, font)
    return coverage, float(font.getlength(word))


def text_width(text: str, size: int) -> float:
    """Return the width of a line of text in pixels."""
    words = text.split(" ")
    return sum(_rendered_word(word, size)[1] for word in words) + (len(words) - 1) * _rendered_word(" ", size)[1]


def draw_text(
    canvas: Image.Image, at: tuple[float, float], text: str, size: int, colour: Colour = TEXT, anchor: str = "l"
) -> None:
    """Draw a line of text with its left end ("l"), middle ("m") or right end ("r") at (x, y).

    Rendered words are cached: captions repeat the same few words and numbers, and text takes longer to draw than maps.
    """
    x = at[0] - {"l": 0.0, "m": 0.5, "r": 1.0}[anchor] * text_width(text, size)
    for word in text.split(" "):
        coverage, advance = _rendered_word(word, size)
        canvas.paste(colour, (round(x), round(at[1])), coverage)
        x += advance + _rendered_word(" ", size)[1]


def draw_text_within(
    canvas: Image.Image, at: tuple[float, float], text: str, width: float, largest: int, colour: Colour = TEXT
) -> None:
    """Draw a line of text from (x, y) on, in the largest size up to ``largest`` that fits the width."""
    size = next((s for s in range(largest, 8, -1) if text_width(text, s) <= width), 8)
    draw_text(canvas, at, text, size, colour)


def in_lines(text: str, width: float, size: int) -> list[str]:
    """Break a line of text that is longer than ``width`` pixels, between its parts, which " · " separates."""
    lines = [""]
    for part in text.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if lines[-1] and text_width(longer, size) > width:
            lines.append(part)
        else:
            lines[-1] = longer
    return lines


def draw_colour_bar(canvas: Image.Image, at: tuple[int, int], colours: Array, ticks: Sequence[str], size: int) -> None:
    """Draw a horizontal bar of colours (width, 3) from pixel (x, y) on, with labels at even distances below.

    Where the bar is too short for all of them, every second label is left out.
    """
    canvas.paste(Image.fromarray(np.broadcast_to(colours, (10, *colours.shape)).copy()), at)
    for index, tick in enumerate(ticks):
        x = at[0] + index * (len(colours) - 1) / (len(ticks) - 1)
        if index % 2 and 1.7 * sum(text_width(one, size) for one in ticks) > len(colours):
            continue
        anchor = "l" if index == 0 else "r" if index == len(ticks) - 1 else "m"
        draw_text(canvas, (x, at[1] + 12), tick, size, DIM_TEXT, anchor)


def encoded(picture: Pixels) -> bytes:
    """Encode for a browser: as WebP, or as JPEG where Pillow is built without it.

    Panels and film strips take 60 % of the bytes of a JPEG that is as similar (0.94 and 0.95 by SSIM). More effort
    (``method``) would save another tenth, and take as long as drawing does.
    """
    if not features.check("webp"):
        return jpeg(picture)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=70, method=1)
    return buffer.getvalue()


def jpeg(picture: Pixels, quality: int = 65) -> bytes:
    """Encode as JPEG without chroma subsampling, which would blur outlines and text."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()
