"""Colour scales by name, which map weights to positions on a colour table. To add one, add an entry to `SCALES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LOW, HIGH = -1.0, 5.0  # ends of the uniform scale in log2: half of uniform to 32 times uniform
OPACITY = 0.45, 0.95  # of a colour over the photograph, at positions 0 and 1
GREY = 0.62  # brightness of the photograph below, in grey


@dataclass(frozen=True)
class Scale:
    """A colour scale and its legend.

    Args:
        position: Maps weights (..., gh, gw) to 0 to 1.
        ticks: Labels at even distances below the colour bar.
        unit: Text beside the colour bar.
        description: Text for error messages.
    """

    position: Callable[[Array], Array]
    ticks: tuple[str, ...]
    unit: str
    description: str


def _in_units_of_uniform(maps: Array) -> Array:
    units = maps * (maps.shape[-1] * maps.shape[-2])
    return np.asarray(np.clip((np.log2(np.maximum(units, 1e-12)) - LOW) / (HIGH - LOW), 0, 1))


def _between_extremes(maps: Array) -> Array:
    low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
    return np.asarray((maps - low) / np.maximum(high - low, 1e-12))


SCALES = {
    "uniform": Scale(
        _in_units_of_uniform, ("0.5", "1", "2", "4", "8", "16", "32"), "× uniform attention", "fixed, comparable"
    ),
    "minmax": Scale(_between_extremes, ("min", "max"), "each map from its minimum to its maximum", "DINO's look"),
}
