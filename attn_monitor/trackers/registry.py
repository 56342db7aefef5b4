"""`tracker_for`: which tracker a logger is. A new one is a module with a `Tracker`, and a line here."""

from __future__ import annotations

from typing import Any

from attn_monitor.trackers.generic import CSV, Generic
from attn_monitor.trackers.mlflow import MLflow
from attn_monitor.trackers.tensorboard import TensorBoard
from attn_monitor.trackers.tracker import Tracker
from attn_monitor.trackers.weights_and_biases import WeightsAndBiases

TRACKERS: tuple[type[Tracker], ...] = (TensorBoard, WeightsAndBiases, MLflow, CSV, Generic)


def tracker_for(logger: Any) -> Tracker:
    """The first that accepts it; `Generic` accepts all."""
    return next(kind for kind in TRACKERS if kind.accepts(logger))(logger)
