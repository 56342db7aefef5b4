"""The legend below a picture: the colour bar with its unit, and the meaning of outlines."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from attn_monitor.draw.canvas import BLOCK, DIM_TEXT, GAP, MASK, TRUTH, draw_colour_bar, draw_text, text_width
from attn_monitor.draw.colormap import colour_table
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.scales import SCALES

LEGEND = 6 * BLOCK  # height of the legend


def draw_legend(
    canvas: Image.Image,
    top: int,
    options: DrawingOptions,
    *,
    masks: bool = True,
    areas: bool = True,
    truth: bool = False,
    larger_text: int = 0,
) -> None:
    """Draw the legend.

    Args:
        canvas: Picture to draw on, in place.
        top: First row of the legend.
        options: Colours of the maps, and the threshold of the masks.
        masks: Explain the outlines of masks.
        areas: Mention that captions give the areas of masks.
        truth: Explain the outlines of ground truth.
        larger_text: Added to the size of the text.
    """
    scale, size = SCALES[options.scale], 13 + larger_text
    bar = min(240, canvas.width // 3)
    table = colour_table(options.colormap)[np.linspace(0, 255, bar).astype(np.uint8)]
    draw_colour_bar(canvas, (GAP, top), table, scale.ticks, size - 1)
    x = GAP * 3 + bar
    draw_text(canvas, (x, top - 4), scale.unit, size, DIM_TEXT)
    mask = f"top {options.threshold:.0%} of attention" + " (area in %)" * areas
    keys = [(MASK, mask)] * masks + [(TRUTH, "ground truth")] * truth
    draw, below = ImageDraw.Draw(canvas), top + 12 + larger_text
    for colour, text in keys:
        draw.rectangle(
            (x, below + 4 + larger_text // 2, x + 11, below + 15 + larger_text // 2), outline=colour, width=2
        )
        draw_text(canvas, (x + 18, below), text, size, DIM_TEXT)
        x += 36 + int(text_width(text, size))
