"""What the page draws with, so that it colours a map as panels do."""

from __future__ import annotations

import base64
from typing import Any

from attn_monitor.draw import differences, scales
from attn_monitor.draw.canvas import MASK, MISSING, TRUTH
from attn_monitor.draw.colormap import COLORMAPS, colour_table
from attn_monitor.draw.hatching import DIMMED, UNSEEN
from attn_monitor.draw.maps import PRACTICALLY_UNIFORM
from attn_monitor.draw.options import DrawingOptions


def drawing_constants() -> dict[str, Any]:
    """Constants of `draw` in plain values: see `Drawing` in web/types.d.ts."""
    options = DrawingOptions()
    return {
        "opacity": scales.OPACITY,
        "grey": scales.GREY,
        "unseen": {"brightness": DIMMED, "line": UNSEEN},
        "mask": MASK,
        "truth": TRUTH,
        "missing": MISSING,
        "practically_uniform": PRACTICALLY_UNIFORM,
        "uniform_range": (scales.LOW, scales.HIGH),
        "scales": {name: {"ticks": scale.ticks, "unit": scale.unit} for name, scale in scales.SCALES.items()},
        "difference": {
            "range": differences.RANGE,
            "ticks": differences.TICKS,
            "opacity": differences.OPACITY,
            "brightness": differences.BRIGHTNESS,
            "colours": differences.COLOURS,
        },
        "tables": {name: base64.b64encode(colour_table(name).tobytes()).decode() for name in COLORMAPS},
        "threshold": options.threshold,
        "scale": options.scale,
        "table": options.colormap,
    }
