"""A chart of the largest attention logit of every layer over a run, with the limits to stay below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from attn_monitor.draw.canvas import GAP, HEADER, Colour, Pixels, blank_picture, draw_text
from attn_monitor.draw.charts import Line, draw_chart
from attn_monitor.draw.colormap import colour_table
from attn_monitor.measure.logit_growth import LARGEST_FLOAT16
from attn_monitor.measurements import MetricKey
from attn_monitor.record.curves import Points

WIDTH, HEIGHT, LEGEND = 640, 320, 15 * GAP  # size of a role's chart, width of the names of layers beside it
MARKS = {"100: where Kimi K2 clips": 100.0, f"{LARGEST_FLOAT16:,.0f}: the largest float16": LARGEST_FLOAT16}


def logit_chart(curves: Mapping[MetricKey, Points]) -> Pixels:
    """Draw a chart per role, one below the other, (height, width, 3).

    Args:
        curves: Points of "max_logit" and "max_logit_cls"; the latter are drawn for layers without the former.
    """
    roles = tuple(dict.fromkeys(key.role for key in curves))
    sheet = Image.fromarray(blank_picture(WIDTH + LEGEND + GAP, HEADER + len(roles) * (HEIGHT + GAP)))
    draw_text(sheet, (GAP, 7), "largest attention logit of each layer", 18)
    for number, role in enumerate(roles):
        by_layer = _by_layer(curves, role)
        top = HEADER + number * (HEIGHT + GAP)
        colours = layer_colours(sorted(by_layer))
        lines: Sequence[Line] = [(colours[layer], points) for layer, (_, points) in by_layer.items()]
        draw_chart(sheet, (0, top), role, lines, size=(WIDTH, HEIGHT), marks=MARKS, log=True)
        _draw_names(sheet, top, {layer: metric for layer, (metric, _) in by_layer.items()}, colours)
    return np.asarray(sheet)


def _by_layer(curves: Mapping[MetricKey, Points], role: str) -> dict[int, tuple[str, Points]]:
    """Return the metric and the points to draw for each layer of a role."""
    found: dict[int, tuple[str, Points]] = {}
    for key, points in sorted(curves.items()):  # "max_logit" comes before "max_logit_cls"
        if key.role == role:
            assert key.layer is not None
            found.setdefault(key.layer, (key.metric, points))
    return found


def layer_colours(layers: Sequence[int]) -> dict[int, Colour]:
    """Assign colours from dark for the first layer to bright for the last."""
    table = colour_table("viridis")
    spread = np.linspace(70, 250, len(layers)) if len(layers) > 1 else [190]
    return {layer: tuple(map(int, table[round(at)])) for layer, at in zip(layers, spread, strict=True)}  # type: ignore[misc]


def _draw_names(sheet: Image.Image, top: int, metrics: Mapping[int, str], colours: Mapping[int, Colour]) -> None:
    """Draw names of layers from the last one down: of large models every second, third and so on."""
    room, size = HEIGHT - 4 * GAP, 16
    every = -(-len(metrics) * size // room)
    for place, layer in enumerate(sorted(metrics, reverse=True)[::every]):
        cls = " (CLS query)" if metrics[layer] == "max_logit_cls" else ""
        draw_text(sheet, (WIDTH, top + 3 * GAP + size * place), f"layer {layer}{cls}", 12, colours[layer])
