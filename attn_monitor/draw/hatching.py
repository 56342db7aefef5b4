"""Hatched patches: those of which a picture shows nothing, whatever the model had there."""

from __future__ import annotations

import numpy as np

from attn_monitor.draw.canvas import BACKGROUND, TEXT, Array, Pixels, resize_cells

LINE_WIDTH = 2  # in pixels, of lines that run up to the right


def hatch(pictures: Pixels, patches: Array) -> None:
    """Hatch patches, bool (gh, gw), on pictures (..., h, w, 3), in place."""
    height, width = pictures.shape[-3:-1]
    inside = resize_cells(patches.astype(np.uint8), (height, width)) > 0
    period = 3 * LINE_WIDTH if height // patches.shape[0] >= 4 * LINE_WIDTH else 2 * LINE_WIDTH  # in small ones too
    diagonal = (np.arange(height)[:, None] + np.arange(width)) % period < LINE_WIDTH
    pictures[..., inside & ~diagonal, :] = BACKGROUND
    pictures[..., inside & diagonal, :] = TEXT
