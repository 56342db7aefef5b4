"""`Curves`: a few metrics of every layer over the whole run, for charts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from attn_monitor.measure.metrics import LARGEST, SINK_SHARES
from attn_monitor.measurements import MetricKey, Metrics
from attn_monitor.record.thinning import thin

MAX_POINTS = 96  # of a curve
CHARTED = (*LARGEST, *SINK_SHARES)

Points = list[tuple[int, float]]


class Curves:
    """Points (step, value) of the metrics in `CHARTED`, over heads and images, thinned evenly to `MAX_POINTS`."""

    def __init__(self, points: Mapping[MetricKey, Points] | None = None) -> None:
        self._points = {key: list(line) for key, line in (points or {}).items()}

    def add(self, step: int, metrics: Metrics) -> None:
        """Append a snapshot's values; drop points of its step and later ones, from before a run was resumed."""
        for key, line in self._points.items():
            self._points[key] = [point for point in line if point[0] < step]
        for key, value in metrics.items():
            if key.head is None and key.metric in CHARTED and math.isfinite(value):
                line = [*self._points.get(key, []), (step, value)]
                chosen = thin([s for s, _ in line], MAX_POINTS * 3 // 4) if len(line) > MAX_POINTS else range(len(line))
                self._points[key] = [line[i] for i in chosen]

    def of(self, metrics: Collection[str]) -> dict[MetricKey, Points]:
        """Return the curves of these metrics, without empty ones."""
        return {key: line for key, line in sorted(self._points.items()) if key.metric in metrics and line}

    def copy(self) -> Curves:
        """Return an independent copy."""
        return Curves(self._points)

    def state_dict(self) -> list[Any]:
        """Return the curves as plain values, for a checkpoint."""
        return [[*key[:3], [list(point) for point in line]] for key, line in self._points.items()]

    @classmethod
    def from_state_dict(cls, state: list[Any]) -> Curves:
        """Restore curves from `state_dict`."""
        return cls({MetricKey(*key): [(int(s), float(v)) for s, v in line] for *key, line in state})
