"""`sink_for`: which class a logger is for. A new kind of logger is a module with a `Sink`, and a line here."""

from __future__ import annotations

from typing import Any

from attn_monitor.publish.generic_loggers import AddImageSink, CSVSink, LogImageSink, MetricsSink
from attn_monitor.publish.mlflow import MLFlowSink
from attn_monitor.publish.sink import Sink
from attn_monitor.publish.tensorboard import TensorBoardSink
from attn_monitor.publish.weights_and_biases import WandbSink

SINKS: tuple[type[Sink], ...] = (
    TensorBoardSink,
    WandbSink,
    MLFlowSink,
    LogImageSink,  # the CSV logger's subclasses too, where they take images
    CSVSink,
    AddImageSink,
    MetricsSink,
)


def sink_for(logger: Any, name: str = "") -> Sink:
    """The sink of the first class that accepts it; ``name`` is that of the callback whose tags it writes."""
    return next(kind for kind in SINKS if kind.accepts(logger))(logger, name)
