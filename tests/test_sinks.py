"""What each kind of logger gets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.publish.generic_loggers import AddImageSink, CSVSink, LogImageSink, MetricsSink
from attn_monitor.publish.sink import Picture, TakesPictures
from attn_monitor.publish.sink_registry import sink_for
from attn_monitor.publish.tensorboard import TensorBoardSink
from attn_monitor.publish.weights_and_biases import WandbSink
from tests.events import Events
from tests.helpers import tiny_vit

PICTURE = Picture("attn_maps/a b", np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8), "a")


def test_plain_summary_writer_takes_everything(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        sink = sink_for(writer)
        assert isinstance(sink, TensorBoardSink)
        sink.log_metrics({"attn/x": 0.5}, 3)
        sink.log_pictures([PICTURE], 3)
        monitor = AttentionMonitor(ProbeBatch(torch.randn(1, 3, 32, 32)), metrics=["entropy", "drift"])
        sink.describe_run("hello", monitor.snapshot({"teacher": tiny_vit()}, step=0))
    events = Events(tmp_path)
    assert events.scalars("attn/x") == [(3, 0.5)]
    ((step, picture),) = events.images("attn_maps/a b")
    assert step == 3
    assert picture.shape == (24, 32, 3)
    assert np.abs(picture.astype(int).mean((0, 1)) - PICTURE.pixels.mean((0, 1))).max() < 5  # channels in order
    assert events.text("attn_monitor/how_to_read") == "hello"
    assert events.charts() == {
        f"{metric} per head": [f"attn_heads/teacher/layer1/{metric}/head.*"] for metric in ("entropy", "drift")
    }


def test_loggers_of_both_namespaces_are_known(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from pytorch_lightning.loggers import TensorBoardLogger as OldTensorBoardLogger

    assert isinstance(sink_for(TensorBoardLogger(tmp_path)), TensorBoardSink)
    assert isinstance(sink_for(OldTensorBoardLogger(tmp_path)), TensorBoardSink)
    assert isinstance(sink_for(CSVLogger(tmp_path)), CSVSink)
    assert not isinstance(sink_for(CSVLogger(tmp_path)), TakesPictures)


def test_a_loggers_kind_is_its_class_and_package(offline: Path) -> None:
    """A class that is merely called Run is no W&B run, and one that is called CSVLogger none of Lightning's."""
    import wandb

    def log_metrics(self: Any, metrics: dict[str, float], step: int) -> None: ...

    for name in ("Run", "SummaryWriter", "CSVLogger", "MLFlowLogger"):
        stranger = type(name, (), {"log_metrics": log_metrics})()
        assert type(sink_for(stranger)) is MetricsSink
    with wandb.init(project="x") as run:
        assert type(sink_for(run)) is WandbSink
        derived = type("MyRun", (type(run),), {})
        assert WandbSink.accepts(derived.__new__(derived))


def test_loggers_are_known_by_what_they_can_do() -> None:
    def log_image(self: Any, key: str, images: list[Any], step: int) -> None: ...

    def add_image(self: Any, tag: str, image: Any, step: int, dataformats: str) -> None: ...

    writer = type("Writer", (), {"add_image": add_image})()
    assert type(sink_for(type("A", (), {"log_image": log_image})())) is LogImageSink
    assert type(sink_for(writer)) is AddImageSink
    assert type(sink_for(type("B", (), {"experiment": writer})())) is AddImageSink

    def broken(self: Any) -> None:
        raise RuntimeError("not connected")

    assert type(sink_for(type("C", (), {"experiment": property(broken)})())) is MetricsSink


def test_a_loggers_prefix_is_kept(tmp_path: Path) -> None:
    """As Lightning's own log_metrics puts it, since that is not what writes the metrics here."""
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, prefix="run", name="", version="")
    logger.log_metrics({"loss": 1.0}, step=1)
    sink_for(logger).log_metrics({"attn/x": 0.5, "attn/y": math.nan}, 3)
    logger.finalize("success")
    events = Events(tmp_path)
    assert events.scalars("run-loss") == [(1, 1.0)]
    assert events.scalars("run-attn/x") == [(3, 0.5)]
    assert math.isnan(events.scalars("run-attn/y")[0][1])
