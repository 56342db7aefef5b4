"""One map in a picture of its own, without text, pixel on pixel with the model's input: for papers and other tools."""

from __future__ import annotations

import numpy as np
from PIL import Image

from attn_monitor.draw.canvas import MASK, MISSING, Array, Pixels, draw_outline, resize_cells
from attn_monitor.draw.cells import overlay
from attn_monitor.draw.colormap import colour_table
from attn_monitor.draw.hatching import hatch
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.scales import SCALES

DIMMED = 0.25  # how bright the photograph is where a mask is not


def heat_map(weights: Array, size: tuple[int, int], options: DrawingOptions, hatched: Array | None = None) -> Pixels:
    """The colours of a map (gh, gw) alone, (height, width, 3): each patch a rectangle of one colour."""
    if np.isfinite(weights).all():
        level = SCALES[options.scale].position(weights)
        cells = colour_table(options.colormap)[(level * 255).astype(np.uint8)]
    else:
        cells = np.full((*weights.shape, 3), MISSING, np.uint8)
    return _hatched(resize_cells(cells, size), hatched)


def heat_map_over(photo: Pixels, weights: Array, options: DrawingOptions, hatched: Array | None = None) -> Pixels:
    """A map (gh, gw) over the photograph (height, width, 3) in grey."""
    height, width = photo.shape[:2]
    (gh, gw), grey = weights.shape, Image.fromarray(photo).convert("L")
    whole = -(-height // gh) * gh, -(-width // gw) * gw  # the next size in which patches are whole pixels
    below = np.asarray(grey.resize((whole[1], whole[0])), dtype=np.float32)
    picture = overlay(weights, below, scale=options.scale, colormap=options.colormap)
    return _hatched(resize_cells(picture, (height, width)), hatched)


def masked(photo: Pixels, mask: Array, hatched: Array | None = None) -> Pixels:
    """The photograph (height, width, 3), dark outside the mask (gh, gw) and outlined at its border."""
    inside = resize_cells(mask.astype(np.uint8), photo.shape[:2]) > 0
    picture: Pixels = np.where(inside[..., None], photo, photo * DIMMED).astype(np.uint8)
    draw_outline(picture, inside, MASK, 1)
    return _hatched(picture, hatched)


def _hatched(picture: Pixels, patches: Array | None) -> Pixels:
    if patches is None:
        return picture
    picture = picture.copy()
    hatch(picture, patches)
    return picture
