"""`tracker_for`: choose the tracker of a logger. To add one, write a module with a `Tracker` and list it here."""

from __future__ import annotations

from typing import Any

from attn_monitor.trackers.aim import Aim
from attn_monitor.trackers.clearml import ClearML
from attn_monitor.trackers.comet import Comet
from attn_monitor.trackers.generic import CSV, Generic
from attn_monitor.trackers.mlflow import MLflow
from attn_monitor.trackers.swanlab import SwanLab
from attn_monitor.trackers.tensorboard import TensorBoard
from attn_monitor.trackers.tracker import Tracker
from attn_monitor.trackers.trackio import Trackio
from attn_monitor.trackers.weights_and_biases import WeightsAndBiases

TRACKERS: tuple[type[Tracker], ...] = (
    *(TensorBoard, WeightsAndBiases, MLflow, Comet, ClearML, Aim, SwanLab, Trackio, CSV),
    Generic,  # which accepts all
)


def tracker_for(logger: Any) -> Tracker:
    """Return the first tracker that accepts a logger; `Generic` accepts all."""
    return next(kind for kind in TRACKERS if kind.accepts(logger))(logger)
