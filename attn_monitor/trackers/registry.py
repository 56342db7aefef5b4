"""`tracker_for`: choose the tracker of a logger. To add one, write a module with a `Tracker` and list it here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from attn_monitor.errors import ArgumentError
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


def check_loggers(loggers: Any) -> list[Any]:
    """Return a user's loggers as a list; None and False are none.

    Raises:
        ArgumentError: They are no list, or one of them has no method for anything.
    """
    if isinstance(loggers or (), (str, Mapping)) or not isinstance(loggers or (), Iterable):
        raise ArgumentError(f"loggers={_named(loggers)}: expected a list, such as loggers=[SummaryWriter()]")
    for index, logger in enumerate(listed := list(loggers or ())):
        if not tracker_for(logger).methods:
            raise ArgumentError(
                f"loggers[{index}]={_named(logger)}: it has no method that takes numbers or pictures; expected a "
                "logger or a run, such as SummaryWriter() or what wandb.init() returns, see docs/trackers.md"
            )
    return listed


def _named(value: Any) -> str:
    """Name a value in a message: plain ones and modules as they are, others by their class."""
    plain = value is None or isinstance(value, (str, int, ModuleType))
    return repr(value) if plain else f"{type(value).__name__}(…)"
