"""Metrics of patch tokens in a run: in every logger and in the archive, computed behind training, off by an option."""

from __future__ import annotations

import csv
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from attn_monitor import AttentionMapCallback, AttentionMonitor, ProbeBatch, load_snapshots
from attn_monitor.draw import history
from attn_monitor.measure.dense_quality import DENSE, dense_quality
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, tiny_vit, trainer


def test_every_logger_and_the_archive_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[threading.Thread] = set()
    measured = history.dense_metrics
    monkeypatch.setattr(
        history, "dense_metrics", lambda layers: threads.add(threading.current_thread()) or measured(layers)
    )
    loggers = [TensorBoardLogger(tmp_path, "run", 0), CSVLogger(tmp_path, "csv", 0)]
    callback = AttentionMapCallback(torch.randn(3, 3, 32, 32), every_n_train_steps=2)
    trainer(tmp_path, callback, logger=loggers, max_steps=4).fit(Distillation(), loader())
    assert threading.main_thread() not in threads
    run = tmp_path / "run" / "version_0"
    snapshots, events = load_snapshots(run / "attn_monitor"), Events(run)
    written = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    rows = list(csv.DictReader(written.splitlines()))
    for role in ("student", "teacher"):
        for name in DENSE:
            tag = f"attn/{role}/layer1/{name}"
            stored = {s.step: s.metrics[tag] for s in snapshots}
            assert list(stored) == [0, 2, 4]
            assert dict(events.scalars(tag)) == pytest.approx(stored, rel=1e-6)
            assert {int(row["step"]): float(row[tag]) for row in rows if row.get(tag)} == pytest.approx(stored)
    assert snapshots[0].metrics["attn/student/layer1/dense_rank"] > 0
    assert not set(callback.monitor.previous.metrics) & {key for key in snapshots[0].metrics if "dense" in key.metric}


def test_they_are_those_of_the_tokens_and_off_by_an_option() -> None:
    model, probe = tiny_vit(), ProbeBatch(torch.randn(3, 3, 32, 32))
    monitor = AttentionMonitor(probe)
    snapshot = monitor.snapshot({"backbone": model}, step=0)
    with torch.no_grad():
        tokens = model.blocks[0](model._pos_embed(model.patch_embed(probe.images)))[:, 1:]
    expected = dense_quality((tokens / tokens.norm(dim=-1, keepdim=True)).half(), (4, 4))
    found = monitor.colored(snapshot).metrics.of_layer("backbone", 1)
    assert {name: found[name] for name in DENSE} == pytest.approx(expected, rel=2e-3)
    other = AttentionMonitor(probe, metrics=["entropy"])
    assert {key.metric for key in other.colored(other.snapshot({"backbone": model}, step=0)).metrics} == {"entropy"}


def test_a_failure_costs_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(layers: object) -> None:
        raise RuntimeError("no convergence")

    monkeypatch.setattr(history, "dense_metrics", fail)
    monitor = AttentionMonitor(ProbeBatch(torch.randn(2, 3, 32, 32)))
    snapshot = monitor.snapshot({"backbone": tiny_vit()}, step=0)
    with pytest.raises(RuntimeError, match="no convergence"):
        monitor.colored(snapshot)
    again = monitor.colored(snapshot)
    assert again.layer("backbone").colors.any()
    assert "attn/backbone/layer1/entropy" in again.metrics
    assert "attn/backbone/layer1/dense_rank" not in again.metrics
