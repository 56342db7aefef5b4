"""Metrics that threads compute: training does not wait for them, and other callbacks may monitor them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from attn_monitor import AttentionMapCallback, AttentionSnapshot, HealthLimits, Watch, load_snapshots
from attn_monitor.measure import global_features
from attn_monitor.train import training_watch
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, tiny_vit, trainer
from tests.support.tiers import sweep

DENSE = "attn/teacher/layer1/dense_separability"
RANK = "attn/backbone/rankme"


def test_a_snapshot_does_not_wait_for_features(tmp_path: Path) -> None:
    """What is not known at the snapshot is in its file and in loggers, and counts for the next verdict."""
    free, measure, model = threading.Event(), global_features.measure_features, tiny_vit()

    def slow(z: Tensor, views: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
        assert free.wait(60)
        return measure(z, views)

    taken: list[AttentionSnapshot] = []
    with patch.object(training_watch, "measure_features", slow):
        watch = Watch(
            model, torch.randn(8, 3, 32, 32), loggers=[writer(tmp_path)], folder=tmp_path, every_n_train_steps=4
        )
        for step in range(9):
            began = time.perf_counter()
            snapshot = watch.step(step)
            assert snapshot is None or time.perf_counter() - began < 30  # less than the thread waits
            taken += [] if snapshot is None else [snapshot]
            if step == 4:
                free.set()
            model(torch.randn(16, 3, 32, 32))
        watch.close(9)
    assert taken[1].step == 4
    assert taken[1].metrics.get(RANK) is None
    files = {s.step: s for s in load_snapshots(tmp_path / "attn_monitor")}
    assert files[4].metrics[RANK] > 1
    assert [step for step, _ in Events(tmp_path).scalars(RANK)] == [4, 8, 9]
    assert watch.monitor is not None
    assert [point.step for point in watch.monitor.past.progress.of("mean_cosine")] == [4, 8, 9]


def writer(folder: Path) -> object:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


@pytest.mark.parametrize("monitored", sweep([DENSE, "attn/teacher/rankme"], quick=1))
def test_checkpoints_are_kept_by_metrics_that_come_late(tmp_path: Path, monitored: str) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", monitor=monitored, mode="max", save_top_k=1, filename="{step}")
    watch = AttentionMapCallback(every_n_epochs=1, health=HealthLimits(peak=1.0, verdict=False))
    stop = EarlyStopping(monitored, mode="max", patience=9)
    running = trainer(tmp_path, watch, keep, stop, max_steps=24, enable_checkpointing=True)
    running.fit(Distillation(), loader(64, 8))
    values = {s.step: s.metrics.get(monitored) for s in load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor")}
    assert float(running.callback_metrics[monitored]) == pytest.approx(values[24])
    best = max((step for step in values if step), key=lambda step: values[step])
    assert Path(keep.best_model_path).stem == f"step={best}"
    assert float(keep.best_model_score) == pytest.approx(values[best])
