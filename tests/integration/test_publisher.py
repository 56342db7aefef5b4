"""`Publisher` in a hand-written loop: what fails is told there and then, without anybody asking for it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionMonitor, ProbeBatch, load_snapshots
from attn_monitor.background.failures import Failures
from attn_monitor.trackers.publisher import Publisher
from tests.support.events import Events
from tests.support.helpers import tiny_vit

PROBE = ProbeBatch(torch.randn(1, 3, 32, 32))


class Unreachable:
    """A logger of one's own, whose pictures never arrive."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics = metrics

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        raise ConnectionError("no route to host")


def loop(publisher: Publisher, steps: int) -> None:
    model, monitor = tiny_vit(), AttentionMonitor(PROBE)
    for step in range(steps):
        publisher.publish(monitor.snapshot({"backbone": model}, step=step))
        publisher.drain()
    publisher.close()


def test_failures_are_warnings_at_the_line_that_published(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path)
    with pytest.warns(UserWarning, match="attn_monitor") as caught:
        loop(Publisher([Unreachable(), writer], PROBE, folder=tmp_path / "archive"), 5)
    writer.close()
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2
    assert (
        "attn_monitor: logging pictures to Unreachable failed, training goes on. ConnectionError: no route" in texts[0]
    )
    assert texts[1].endswith("this was not done:\n  logging pictures to Unreachable: steps 0, 1, 2, 3, 4")
    assert {w.filename for w in caught} == {__file__}
    assert len(load_snapshots(tmp_path / "archive")) == 5
    assert len(Events(tmp_path).images("attn_maps/image0")) == 5


def test_the_last_failure_is_told_at_the_end() -> None:
    with pytest.warns(UserWarning, match="attn_monitor") as caught:
        loop(Publisher([Unreachable()], PROBE), 1)
    assert [str(w.message).splitlines()[-1] for w in caught] == [
        "attn_monitor: logging pictures to Unreachable failed, training goes on. ConnectionError: no route to host",
        "  logging pictures to Unreachable: step 0",
    ]


def test_the_end_of_a_run_tells_too(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path)
    publisher = Publisher([writer], PROBE)
    publisher.publish(AttentionMonitor(PROBE).snapshot({"backbone": tiny_vit()}, step=0))
    publisher.drain()
    writer.close()
    writer._get_file_writer = lambda: (_ for _ in ()).throw(OSError("closed"))
    with pytest.warns(UserWarning, match="the end of the run to SummaryWriter failed.* OSError: closed"):
        publisher.close()
    publisher.close()  # a second time there is nothing left to do


def test_whoever_passes_the_account_reports_himself() -> None:
    failures, told = Failures(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(Publisher([Unreachable()], PROBE, failures=failures), 1)
    failures.report(told.append)
    assert len(told) == 2


def test_health_flags_are_warnings_too() -> None:
    """In a hand-written loop, at the line that published them, and even where the publisher is not asked to write."""
    publisher = Publisher([], PROBE)
    monitor = AttentionMonitor(PROBE)
    model = tiny_vit()
    publisher.publish(monitor.snapshot({"backbone": model}, step=0))
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.fill_(math.nan)
    with pytest.warns(
        UserWarning, match="attn_monitor: attention health\n  backbone, layer 1, heads 0, 1, 2, 3"
    ) as told:
        publisher.publish(monitor.snapshot({"backbone": model}, step=1))
    publisher.close()
    assert [w.filename for w in told] == [__file__]


def test_the_past_of_a_monitor_is_filled_once(tmp_path: Path) -> None:
    """Pictures, the archive and the next verdict read one entry of it, so that a step has the same metrics in all."""
    monitor = AttentionMonitor(PROBE, metrics="all")
    publisher = Publisher([], PROBE, folder=tmp_path, history=monitor.history, curves=monitor.curves)
    entries = []
    for step in range(2):
        snapshot = monitor.snapshot({"backbone": tiny_vit()}, step=step)
        entries.append(monitor.history.entries[-1])
        publisher.publish(snapshot)
    publisher.close()
    assert all(a is b for a, b in zip(monitor.history.entries, entries, strict=True))
    for entry, stored in zip(entries, load_snapshots(tmp_path), strict=True):
        measured = {key: value for key, value in entry.snapshot.metrics.items() if "dense" in key.metric}
        assert measured
        assert measured == {key: stored.metrics[key] for key in measured}
