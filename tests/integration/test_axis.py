"""One x axis for a run: attention is at the steps where Lightning's loggers have the loss, however people optimize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, load_snapshots
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, trainer
from tests.support.tiers import sweep

RUN = Path("run") / "version_0"
ENTROPY = "attn/teacher/layer1/entropy"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Manual(Distillation):
    """Optimizers of its own making, all of which step in every batch, or every so many batches."""

    def __init__(self, optimizers: int = 2, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.count, self.every = optimizers, every

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        parts: list[nn.Module] = [self.student_backbone, self.head]
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in parts[: self.count]]


def logged(folder: Path, tag: str) -> list[int]:
    return [step for step, _ in Events(folder / RUN).scalars(tag)]


@pytest.mark.parametrize(
    ("build", "settings", "batches"),
    sweep(
        [
            (Manual, {"max_steps": 16}, 8),
            (Distillation, {"max_steps": 4, "accumulate_grad_batches": 2}, 4),
            (Distillation, {"max_steps": 8}, 8),
            (Manual, {"max_steps": -1, "max_epochs": 2}, 8),
            (lambda: Manual(1), {"max_steps": 8}, 8),
            (lambda: Manual(2, every=2), {"max_steps": -1, "max_epochs": 2}, 8),
        ],
        quick=2,
    ),
    ids=["two optimizers", "accumulation", "automatic", "two optimizers, epochs", "one, manual", "own accumulation"],
)
@pytest.mark.parametrize("schedule", sweep([None, 1], quick=1))
def test_attention_and_loss_have_the_same_steps(
    tmp_path: Path, build: Any, settings: dict[str, Any], batches: int, schedule: int | None
) -> None:
    watch = AttentionMapCallback(every_n_train_steps=schedule, on_error="raise")
    running = trainer(tmp_path, watch, LearningRateMonitor("step"), **settings)
    running.fit(build(), loader())
    steps = list(range(batches + 1))
    assert logged(tmp_path, ENTROPY) == steps
    assert [s.step for s in load_snapshots(tmp_path / RUN / "attn_monitor")] == steps
    assert [step for step, _ in Events(tmp_path / RUN).images("attn_maps/image0")] == steps
    assert sorted(set(logged(tmp_path, "loss"))) == steps[:-1]


@pytest.mark.slow
def test_the_schedule_counts_in_steps_of_loggers(tmp_path: Path) -> None:
    """Neither twice the snapshots nor half of them: every fourth batch, of 20 in which two optimizers step."""
    watch = AttentionMapCallback(every_n_train_steps=4, on_error="raise")
    trainer(tmp_path, watch, max_steps=40).fit(Manual(), loader())
    assert logged(tmp_path, ENTROPY) == [0, 4, 8, 12, 16, 20]


def test_csv_rows_have_both(tmp_path: Path) -> None:
    import csv

    logger = CSVLogger(tmp_path, name="run", version=0)
    trainer(tmp_path, AttentionMapCallback(every_n_train_steps=1), max_steps=8, logger=logger).fit(Manual(), loader())
    with open(tmp_path / RUN / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["loss"]] == [0, 1, 2, 3]
    assert [int(row["step"]) for row in rows if row[ENTROPY]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stop", sweep([3, 1, 4, 6], quick=1))
@pytest.mark.parametrize("end", sweep([8, None], quick=1), ids=["goes on", "is complete"])
def test_resumed_with_two_optimizers(tmp_path: Path, stop: int, end: int | None) -> None:
    """Stopped within an epoch, at its end, and after it: no step twice, none missing, none under another's number."""
    saved = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=2 * stop)
    first = AttentionMapCallback(every_n_train_steps=2)
    running = trainer(tmp_path, first, saved, max_steps=2 * stop, enable_checkpointing=True)
    running.fit(Manual(), loader())
    again = AttentionMapCallback(every_n_train_steps=2, on_error="raise")
    trainer(tmp_path, again, max_steps=2 * (end or stop)).fit(
        Manual(), loader(), ckpt_path=tmp_path / "ckpt" / "last.ckpt"
    )
    expected = sorted({s for s in (0, 2, 4, 6, 8) if s <= (end or stop)} | {stop})
    assert [s.step for s in load_snapshots(tmp_path / RUN / "attn_monitor")] == expected
    assert logged(tmp_path, ENTROPY) == expected
    assert again.kept.schedule.last_step == (expected[-1] if end else [s for s in expected if s < stop][-1])  # not run
