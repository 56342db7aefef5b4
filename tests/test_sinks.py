"""What each kind of logger gets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.publish import sinks
from attn_monitor.publish.sinks import Picture
from tests.events import Events
from tests.helpers import tiny_vit

PICTURE = Picture("attn_maps/a b", np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8), "a")


def test_plain_summary_writer_takes_everything(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        sinks.log_scalars(writer, metrics={"attn/x": 0.5}, step=3)
        sinks.log_pictures(writer, pictures=[PICTURE], step=3)
        monitor = AttentionMonitor(ProbeBatch(torch.randn(1, 3, 32, 32)), metrics=["entropy", "drift"])
        sinks.describe_run(writer, text="hello", snapshot=monitor.snapshot({"teacher": tiny_vit()}, step=0))
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

    assert sinks.takes_pictures(TensorBoardLogger(tmp_path))
    assert not sinks.takes_pictures(CSVLogger(tmp_path))


def test_a_loggers_prefix_is_kept(tmp_path: Path) -> None:
    """As Lightning's own log_metrics puts it, since that is not what writes the metrics here."""
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, prefix="run", name="", version="")
    logger.log_metrics({"loss": 1.0}, step=1)
    sinks.log_scalars(logger, metrics={"attn/x": 0.5, "attn/y": math.nan}, step=3)
    logger.finalize("success")
    events = Events(tmp_path)
    assert events.scalars("run-loss") == [(1, 1.0)]
    assert events.scalars("run-attn/x") == [(3, 0.5)]
    assert math.isnan(events.scalars("run-attn/y")[0][1])
