"""What each kind of logger gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import sinks
from attn_monitor.sinks import Picture
from tests.events import Events

PICTURE = Picture("attn_maps/a b", np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8), "a")


def test_plain_summary_writer_takes_everything(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        sinks.log_scalars(writer, metrics={"attn/x": 0.5}, step=3)
        sinks.log_pictures(writer, pictures=[PICTURE], step=3)
        sinks.describe_run(writer, text="hello", layers=[("teacher", 3)])
    events = Events(tmp_path)
    assert events.scalars("attn/x") == [(3, 0.5)]
    ((step, picture),) = events.images("attn_maps/a b")
    assert step == 3
    assert picture.shape == (24, 32, 3)
    assert np.abs(picture.astype(int).mean((0, 1)) - PICTURE.pixels.mean((0, 1))).max() < 5  # channels in order
    assert events.text("attn_monitor/how_to_read") == "hello"


def test_loggers_of_both_namespaces_are_known(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    assert sinks.takes_pictures(TensorBoardLogger(tmp_path))
    assert not sinks.takes_pictures(CSVLogger(tmp_path))
