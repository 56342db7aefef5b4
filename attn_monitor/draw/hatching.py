"""Hatching, for patches that are left out and for parts of an image that no patch covers."""

from __future__ import annotations

import numpy as np

from attn_monitor.draw.canvas import BACKGROUND, TEXT, Array, Colour, Pixels

LINE_WIDTH = 2  # in pixels
UNSEEN: Colour = (70, 70, 78)  # colour of lines where no patch is
DIMMED = 0.25  # brightness of the photograph there, and outside a mask


def hatch(pictures: Pixels, inside: Array, patch: int) -> None:
    """Hatch a part, bool (h, w), of pictures (..., h, w, 3) in place; ``patch`` is the shorter side of one."""
    period = 3 * LINE_WIDTH if patch >= 4 * LINE_WIDTH else 2 * LINE_WIDTH  # visible in small patches too
    diagonal = _lines(inside.shape, period)
    pictures[..., inside & ~diagonal, :] = BACKGROUND
    pictures[..., inside & diagonal, :] = TEXT


def unseen_picture(grey: Array, seen: tuple[slice, slice]) -> Pixels:
    """Darken a grey photograph (h, w), and hatch it outside of what patches see. Returns (h, w, 3)."""
    picture: Pixels = np.repeat((grey * DIMMED).astype(np.uint8)[..., None], 3, axis=-1)
    lines = _lines(grey.shape, 4 * LINE_WIDTH)
    lines[seen] = False
    picture[lines] = UNSEEN
    return picture


def _lines(size: tuple[int, ...], period: int) -> Array:
    lines: Array = (np.arange(size[0])[:, None] + np.arange(size[1])) % period < LINE_WIDTH
    return lines
