"""A heat map of all layers: one number per head and layer as a colour, in place of hundreds of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from attn_monitor.draw.canvas import (
    DIM_TEXT,
    GAP,
    HEADER,
    LINE,
    MISSING,
    Array,
    Pixels,
    blank_picture,
    draw_colour_bar,
    draw_text,
    draw_text_within,
)
from attn_monitor.draw.colormap import colour_table
from attn_monitor.measure.metrics import LARGEST
from attn_monitor.measurements import MetricKey
from attn_monitor.snapshot import Snapshot

CELL, LEFT = 24, 8 * GAP  # pixels: side of a cell, width of the names of layers
LEAST_WIDTH = 40 * GAP  # of a role, so that its text fits


@dataclass(frozen=True)
class HeatScale:
    """The metric that a heat map shows, and its colour scale.

    Args:
        title: Text above the map.
        metrics: Names of metrics, of which the first that a layer has is shown.
        ticks: Values at even distances from the lowest colour to the highest.
        log: Use a logarithmic scale.
    """

    title: str
    metrics: tuple[str, ...]
    ticks: tuple[float, ...]
    log: bool = False

    def position(self, values: Array) -> Array:
        """Map values to 0 to 1 on the colour table; keep NaN."""
        ends = [math.log10(t) if self.log else t for t in (self.ticks[0], self.ticks[-1])]
        shown = np.log10(np.maximum(values, self.ticks[0])) if self.log else values
        return np.asarray(np.clip((shown - ends[0]) / (ends[1] - ends[0]), 0, 1))


HEAT_SCALES = {
    "entropy": HeatScale("entropy: 0 one patch, 1 uniform", ("entropy",), (0, 0.25, 0.5, 0.75, 1)),
    "logits": HeatScale("largest attention logit", LARGEST, (0.1, 1, 10, 100, 1000), log=True),
}


def head_values(snapshot: Snapshot, role: str, metrics: Sequence[str]) -> Array:
    """Return each head's value, (layers, heads), of the first of these metrics that it has; NaN if it has none."""
    layers = snapshot.layers_of(role)
    heads = max(snapshot.layers[role, layer].rows.shape[1] for layer in layers)
    values = np.full((len(layers), heads), np.nan)
    for row, layer in enumerate(layers):
        for head in range(heads):
            known = (snapshot.metrics.get(MetricKey(role, layer, metric, head)) for metric in metrics)
            values[row, head] = next((value for value in known if value is not None), np.nan)
    return values


def layer_heat_map(snapshot: Snapshot, scale: HeatScale) -> Pixels | None:
    """Draw a grid per role, the last layer on top, (height, width, 3); None if nothing was measured."""
    grids = {role: head_values(snapshot, role, scale.metrics) for role in snapshot.roles}
    if all(np.isnan(values).all() for values in grids.values()):
        return None
    widths = {role: max(LEAST_WIDTH, LEFT + values.shape[1] * CELL + GAP) for role, values in grids.items()}
    tallest = max(len(values) for values in grids.values()) * CELL
    top = HEADER + 2 * LINE
    sheet = Image.fromarray(blank_picture(sum(widths.values()) + GAP, top + tallest + 5 * LINE))
    draw_text_within(sheet, (GAP, 7), f"{scale.title}, step {snapshot.step:,}", sheet.width - 2 * GAP, 16)
    x = 0
    for role, values in grids.items():
        names = [f"layer {layer}{_star(snapshot, role, layer, scale)}" for layer in snapshot.layers_of(role)]
        _draw_grid(sheet, (x, HEADER), role, names, scale.position(values))
        x += widths[role]
    ramp = colour_table("viridis")[np.linspace(0, 255, LEAST_WIDTH - LEFT - 2 * GAP).astype(int)]
    draw_colour_bar(sheet, (LEFT, top + tallest + 2 * LINE), ramp, [f"{tick:,g}" for tick in scale.ticks], 12)
    return np.asarray(sheet)


def _star(snapshot: Snapshot, role: str, layer: int, scale: HeatScale) -> str:
    """Return a star if the value is that of the CLS query alone."""
    every_query = scale.metrics[0] in snapshot.metrics.of_layer(role, layer)
    return "" if every_query or len(scale.metrics) == 1 else "*"


def _draw_grid(sheet: Image.Image, at: tuple[int, int], role: str, names: Sequence[str], positions: Array) -> None:
    left, top = at[0] + LEFT, at[1] + 2 * LINE
    colours = colour_table("viridis")[(np.nan_to_num(positions) * 255).round().astype(int)]
    colours = np.where(np.isnan(positions)[..., None], np.array(MISSING, np.uint8), colours)[::-1]
    picture = colours.repeat(CELL, 0).repeat(CELL, 1).copy()
    picture[::CELL], picture[:, ::CELL] = 0, 0  # thin lines between cells
    sheet.paste(Image.fromarray(picture), (left, top))
    note = ", * of the CLS query" if any(name.endswith("*") for name in names) else ""
    draw_text(sheet, (left, at[1]), f"{role}: heads across{note}", 13)
    for place, name in enumerate(reversed(names)):
        draw_text(sheet, (left - 5, top + place * CELL + 5), name, 12, DIM_TEXT, "r")
    for head in range(positions.shape[1]):
        draw_text(sheet, (left + (head + 0.5) * CELL, top - LINE + 1), str(head), 11, DIM_TEXT, "m")
