"""Labels and checkpoints: `backfill` measures what a live run did, and `pick` ranks by it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from attn_monitor import (
    ArchiveError,
    AttentionMapCallback,
    AttentionMonitor,
    EvaluationOptions,
    HealthLimits,
    ProbeBatch,
    load_snapshots,
)
from attn_monitor.commands import cli
from attn_monitor.commands.backfill import Backfilled, backfill_run
from tests.integration.test_evaluation import labelled
from tests.support.helpers import Distillation, loader, tiny_vit, trainer

PROBE = ProbeBatch(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
LABELLED = EvaluationOptions(labelled(), k=5)
TAGS = [f"attn/{role}/{name}_accuracy" for role in ("student", "teacher") for name in ("knn", "ridge")]


class Keep(pl.Callback):
    """Save a checkpoint where snapshots are taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % 2 == 0:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    quiet = HealthLimits(peak=1.0, verdict=False, check_ema=False)
    watch = AttentionMapCallback(PROBE, every_n_train_steps=2, evaluation=LABELLED, health=quiet)
    running = trainer(folder, watch, Keep(folder / "checkpoints"), max_steps=8, enable_checkpointing=True)
    with warnings.catch_warnings():  # Lightning's about the loader
        warnings.simplefilter("ignore")
        running.fit(Distillation(), loader(shuffle=True))
    return folder


def filled(run: Path, out: Path, **settings: Any) -> Backfilled:
    monitor = AttentionMonitor(PROBE, health=HealthLimits(peak=1.0, verdict=False), or_mean=True)
    return backfill_run(
        run / "checkpoints", tiny_vit(), monitor, out, loggers="none", notify=lambda _: None, **settings
    )


@pytest.mark.slow
def test_backfill_evaluates_as_the_callback_did(run: Path, tmp_path: Path) -> None:
    live = {s.step: s.metrics for s in load_snapshots(run / "run" / "version_0" / "attn_monitor")}
    again = filled(run, tmp_path, evaluation=LABELLED)
    for snapshot in load_snapshots(again.archive):
        for tag in TAGS:
            assert snapshot.metrics[tag] == live[snapshot.step][tag], (snapshot.step, tag)
    assert again.added == (0, 2, 4, 6, 8)
    with pytest.raises(ArchiveError, match="evaluation"):
        filled(run, tmp_path)


def test_pick_ranks_checkpoints_by_labels(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = labelled(48)
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = tmp_path / "labelled" / str(label) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = ((image + 3) / 7).clamp(0, 1).mul(255).permute(1, 2, 0).numpy().astype(np.uint8)
        Image.fromarray(pixels).save(file)
    PROBE.save(tmp_path / "probe.npz")
    command = ["pick", str(run / "checkpoints"), "--model", "tests.support.helpers:tiny_vit", "--json"]
    command += ["--probe", str(tmp_path / "probe.npz"), "--evaluation", str(tmp_path / "labelled")]
    cli.main(command)
    rankings = json.loads(capsys.readouterr().out)["rankings"]
    found = [(r["role"], r["measure"], len(r["scores"])) for r in rankings if r["use"] == "global"]
    assert found == [("teacher", "knn_accuracy", 4), ("student", "knn_accuracy", 4)]
