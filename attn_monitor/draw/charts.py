"""Line charts of metrics over steps, many on a sheet, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from attn_monitor.draw.canvas import (
    DIM_TEXT,
    GAP,
    HEADER,
    LINE,
    MASK,
    Colour,
    Pixels,
    blank_picture,
    draw_text,
    draw_text_within,
)
from attn_monitor.draw.strips import short_step

Points = Sequence[tuple[int, float]]
Line = tuple[Colour, Points]
"""A curve: (step, value) in order of steps, and its colour."""

WIDTH, HEIGHT, COLUMNS = 320, 184, 5  # of a chart in pixels, and charts in a row
LEFT, TOP, BOTTOM = 7 * GAP, 3 * GAP, 3 * GAP  # of a chart, for text
FINER = 3  # lines are drawn so many times larger, and scaled down


def chart_sheet(title: Sequence[tuple[str, Colour]], sections: Mapping[str, Mapping[str, Sequence[Line]]]) -> Pixels:
    """Charts by section and name, each with an axis of its own over all its lines, (height, width, 3).

    ``title`` are lines of text with their colours, which say what the colours of curves mean.
    """
    rows = {name: math.ceil(len(charts) / COLUMNS) for name, charts in sections.items()}
    columns = max(2, min(COLUMNS, max(map(len, sections.values()))))
    header = HEADER + 20 * (len(title) - 1)
    size = columns * (WIDTH + GAP) + GAP, header + sum(2 * LINE + n * (HEIGHT + GAP) for n in rows.values())
    sheet = Image.fromarray(blank_picture(*size))
    for number, (text, colour) in enumerate(title):
        draw_text_within(sheet, (GAP, 7 + 20 * number), text, size[0] - 2 * GAP, 15, colour)
    top = header
    for section, charts in sections.items():
        draw_text(sheet, (GAP, top + 4), section, 15, MASK)
        top += 2 * LINE
        for index, (name, lines) in enumerate(charts.items()):
            at = GAP + index % columns * (WIDTH + GAP), top + index // columns * (HEIGHT + GAP)
            _draw_chart(sheet, at, name, lines)
        top += rows[section] * (HEIGHT + GAP)
    return np.asarray(sheet)


def _draw_chart(sheet: Image.Image, at: tuple[int, int], name: str, lines: Sequence[Line]) -> None:
    points = [point for _, line in lines for point in line]
    steps, values = [step for step, _ in points], [value for _, value in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    margin = 0.05 * (high - low) or max(1e-3, 0.05 * abs(high))
    low, high = low - margin, high + margin
    width, height = WIDTH - LEFT - GAP, HEIGHT - TOP - BOTTOM
    plot = Image.new("RGB", (width * FINER, height * FINER), (30, 30, 36))
    draw = ImageDraw.Draw(plot)

    def place(point: tuple[int, float]) -> tuple[float, float]:
        across = (point[0] - first) / max(1, last - first)
        return across * (width - 1) * FINER, (high - point[1]) / (high - low) * (height - 1) * FINER

    for colour, line in lines:
        places = [place(point) for point in line]
        draw.line(places, colour, 2 * FINER, joint="curve")
        for x, y in places if len(places) <= 30 else ():
            radius = 2.5 * FINER
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    x, y = at[0] + LEFT, at[1] + TOP
    sheet.paste(plot.resize((width, height), Image.Resampling.BOX), (x, y))
    draw_text(sheet, (x, at[1] + 4), name.replace("_", " "), 13)
    lowest, highest = told_apart(min(values), max(values))
    draw_text(sheet, (x - 4, y - 2), highest, 12, DIM_TEXT, "r")
    draw_text(sheet, (x - 4, y + height - 15), lowest, 12, DIM_TEXT, "r")
    draw_text(sheet, (x, y + height + 3), short_step(first), 12, DIM_TEXT)
    draw_text(sheet, (x + width, y + height + 3), short_step(last), 12, DIM_TEXT, "r")


def told_apart(low: float, high: float) -> tuple[str, str]:
    """Two numbers in three digits, or in as many as it takes to see that they differ."""
    texts = [(f"{low:.{digits}g}", f"{high:.{digits}g}") for digits in range(3, 7)]
    return next((both for both in texts if both[0] != both[1]), texts[0])
