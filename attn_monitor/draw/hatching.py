"""Hatched parts of pictures: patches of which nothing is shown, and the parts of an image that no patch sees."""

from __future__ import annotations

import numpy as np

from attn_monitor.draw.canvas import BACKGROUND, TEXT, Array, Colour, Pixels

LINE_WIDTH = 2  # in pixels, of lines that run up to the right
UNSEEN: Colour = (70, 70, 78)  # of the lines where no patch is
DIMMED = 0.25  # how bright the photograph is there, and where a mask is not


def hatch(pictures: Pixels, inside: Array, patch: int) -> None:
    """Hatch a part, bool (h, w), of pictures (..., h, w, 3) whose patches are so many pixels high, in place."""
    period = 3 * LINE_WIDTH if patch >= 4 * LINE_WIDTH else 2 * LINE_WIDTH  # in small ones too
    diagonal = _lines(inside.shape, period)
    pictures[..., inside & ~diagonal, :] = BACKGROUND
    pictures[..., inside & diagonal, :] = TEXT


def unseen_picture(grey: Array) -> Pixels:
    """A photograph in grey (h, w) as it is shown where no patch sees it, (h, w, 3): dark and hatched."""
    picture: Pixels = np.repeat((grey * DIMMED).astype(np.uint8)[..., None], 3, axis=-1)
    picture[_lines(grey.shape, 4 * LINE_WIDTH)] = UNSEEN
    return picture


def _lines(size: tuple[int, ...], period: int) -> Array:
    lines: Array = (np.arange(size[0])[:, None] + np.arange(size[1])) % period < LINE_WIDTH
    return lines
