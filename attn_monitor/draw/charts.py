"""Sheets of line charts of metrics over steps, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
"""The colour of a curve and its (step, value) points in order of steps."""

WIDTH, HEIGHT, COLUMNS = 320, 184, 5  # size of a chart in pixels, and charts in a row
LEFT, TOP, BOTTOM = 7 * GAP, 3 * GAP, 3 * GAP  # margins of a chart for text
GRID, MARK = (48, 48, 56), (232, 120, 90)
FINER = 3  # oversampling of lines


def chart_sheet(title: Sequence[tuple[str, Colour]], sections: Mapping[str, Mapping[str, Sequence[Line]]]) -> Pixels:
    """Draw charts by section and name, each with its own axis, as one picture (height, width, 3).

    Args:
        title: Lines of text with their colours, which explain the colours of the curves.
        sections: Curves by the section's and the chart's name.
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
            draw_chart(sheet, at, name.replace("_", " "), lines)
        top += rows[section] * (HEIGHT + GAP)
    return np.asarray(sheet)


@dataclass(frozen=True)
class _Axis:
    """A vertical axis from ``low`` to ``high``, in decimal logarithms if ``log``; ``ticks`` are values by label."""

    low: float
    high: float
    ticks: Mapping[str, float]
    log: bool = False

    @classmethod
    def linear(cls, values: Sequence[float]) -> _Axis:
        """Span the values with a margin."""
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or max(1e-3, 0.05 * abs(high))
        lowest, highest = distinct_labels(low, high)
        return cls(low - margin, high + margin, {highest: high, lowest: low})

    @classmethod
    def decades(cls, values: Sequence[float]) -> _Axis:
        """Span the values by whole powers of ten from 0.1 on."""
        low = math.floor(math.log10(max(min(values), 0.1)))
        high = max(low + 1, math.ceil(math.log10(max(*values, 0.1))))
        return cls(low, high, {f"{10.0**n:,.6g}": 10.0**n for n in range(low, high + 1)}, log=True)

    def down(self, value: float) -> float:
        """Return the relative distance of a value from the top: 0 at the top, 1 at the bottom and below."""
        position = (math.log10(value) if value > 0 else self.low) if self.log else value
        return min(1.0, (self.high - position) / (self.high - self.low))


def draw_chart(
    sheet: Image.Image,
    at: tuple[int, int],
    title: str,
    lines: Sequence[Line],
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    marks: Mapping[str, float] | None = None,
    log: bool = False,
) -> None:
    """Draw one chart onto a sheet.

    Args:
        sheet: Picture to draw on, in place.
        at: Pixel (x, y) of the upper left corner.
        title: Text above the chart.
        lines: Curves with their colours, at least one point in all.
        size: Width and height in pixels.
        marks: Horizontal lines by name.
        log: Use a logarithmic axis.
    """
    marks = marks or {}
    points = [point for _, line in lines for point in line]
    steps, values = [step for step, _ in points], [value for _, value in points]
    first, last = min(steps), max(steps)
    axis = _Axis.decades([*values, *marks.values()]) if log else _Axis.linear([*values, *marks.values()])
    width, height = size[0] - LEFT - GAP, size[1] - TOP - BOTTOM
    plot = Image.new("RGB", (width * FINER, height * FINER), (30, 30, 36))
    draw = ImageDraw.Draw(plot)

    def level(value: float, colour: Colour) -> None:
        y = round(axis.down(value) * (height - 1)) * FINER + FINER // 2  # one row of pixels
        draw.line(((0, y), (width * FINER, y)), colour, FINER)

    for value in axis.ticks.values() if log else ():
        level(value, GRID)
    for value in marks.values():
        level(value, MARK)
    for colour, line in lines:
        places = [
            ((step - first) / max(1, last - first) * (width - 1) * FINER, axis.down(value) * (height - 1) * FINER)
            for step, value in line
        ]
        draw.line(places, colour, 2 * FINER, joint="curve")
        for x, y in places if len(places) <= 30 else ():
            radius = 2.5 * FINER
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    x, y = at[0] + LEFT, at[1] + TOP
    sheet.paste(plot.resize((width, height), Image.Resampling.BOX), (x, y))
    draw_text(sheet, (x, at[1] + 4), title, 13)
    for text, value in axis.ticks.items():
        draw_text(sheet, (x - 4, y + axis.down(value) * (height - 1) - 7), text, 12, DIM_TEXT, "r")
    for text, value in marks.items():
        draw_text(sheet, (x + 4, y + axis.down(value) * (height - 1) + 1), text, 12, MARK)
    draw_text(sheet, (x, y + height + 3), short_step(first), 12, DIM_TEXT)
    draw_text(sheet, (x + width, y + height + 3), short_step(last), 12, DIM_TEXT, "r")


def distinct_labels(low: float, high: float) -> tuple[str, str]:
    """Format two numbers in three digits, or in as many as make different numbers look different."""
    texts = [(f"{low:.{digits}g}", f"{high:.{digits}g}") for digits in range(3, 7)]
    return next((both for both in texts if both[0] != both[1]), texts[0])
