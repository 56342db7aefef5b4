"""What a Trainer can do beside a plain fit: short runs, other loops, tuners, and fits one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from attn_monitor import AttentionMapCallback, load_snapshots
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, trainer
from tests.support.releases import LIGHTNING
from tests.support.tiers import sweep

RUN = Path("run") / "version_0"
ENTROPY = "attn/teacher/layer1/entropy"


def steps(folder: Path, run: Path = RUN) -> list[int]:
    """Steps of the one archive, which are also those in the event files."""
    archived = [s.step for s in load_snapshots(folder / run / "attn_monitor")]
    assert not (folder / run / "attn_monitor-2").exists()
    assert [step for step, _ in Events(folder / run).scalars(ENTROPY)] == archived
    return archived


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def watch(**arguments: Any) -> AttentionMapCallback:
    return AttentionMapCallback(**{"every_n_train_steps": 1, "on_error": "raise", **arguments})


@pytest.mark.parametrize(
    ("settings", "expected"),
    sweep(
        [
            ({"limit_train_batches": 2, "max_epochs": 3}, range(7)),
            ({"limit_train_batches": 0.5, "max_epochs": 2}, range(5)),
            ({"overfit_batches": 2, "max_epochs": 2}, range(5)),
            ({"val_check_interval": 2, "max_epochs": 2}, range(9)),
            ({"val_check_interval": 3, "check_val_every_n_epoch": None, "max_steps": 7}, range(8)),
            ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, range(9)),
            ({"num_sanity_val_steps": 0, "max_steps": 3}, range(4)),
            ({"limit_val_batches": 0, "max_steps": 3}, range(4)),
        ],
        quick=1,
    ),
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*overfit_batches", "ignore:You requested to overfit")
def test_each_optimizer_step_is_seen_once(tmp_path: Path, settings: dict[str, Any], expected: range) -> None:
    trainer(tmp_path, watch(), **{"max_steps": -1, **settings}).fit(Distillation(), loader(), loader(8))
    assert steps(tmp_path) == list(expected)


@pytest.mark.parametrize("batches", [True, 2])
def test_fast_dev_run_takes_snapshots_and_writes_nothing(tmp_path: Path, batches: Any) -> None:
    callback = watch()
    trainer(tmp_path, callback, fast_dev_run=batches).fit(Distillation(), loader(), loader(8))
    assert callback.monitor is not None
    assert [s.step for s in callback.monitor.history] == list(range(batches + 1))
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_a_run_that_ends_by_the_clock_has_its_last_snapshot(tmp_path: Path) -> None:
    running = trainer(tmp_path, AttentionMapCallback(), max_steps=-1, max_epochs=-1, max_time={"seconds": 2})
    running.fit(Distillation(), loader())
    found = steps(tmp_path)
    assert found[0] == 0
    assert found[-1] == running.global_step > 0


class Evaluates(Distillation):
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.student_backbone(batch).square().mean())

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.student_backbone(batch)


@pytest.mark.parametrize("loop", sweep(["validate", "test", "predict"], quick=1))
@pytest.mark.parametrize("probe", [None, torch.randn(2, 3, 32, 32)], ids=["adopted", "given"])
def test_other_loops_are_not_watched(tmp_path: Path, loop: str, probe: Tensor | None) -> None:
    callback, module = watch(probe=probe), Evaluates()
    running = trainer(tmp_path, callback, max_steps=2)
    getattr(running, loop)(module, loader(8))
    assert callback.monitor is None
    assert not [path for path in files(tmp_path) if "attn_monitor" in str(path)]
    assert not [key for key in running.callback_metrics if "attn" in key]
    running.fit(module, loader(), loader(8))
    before = files(tmp_path / RUN / "attn_monitor")
    assert callback.monitor is not None
    history = [s.step for s in callback.monitor.history]
    getattr(running, loop)(module, loader(8))
    assert files(tmp_path / RUN / "attn_monitor") == before
    assert [s.step for s in callback.monitor.history] == history == [0, 1, 2]
    assert steps(tmp_path) == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_other_loops_load_checkpoints_of_watched_runs(tmp_path: Path, loop: str) -> None:
    module = Evaluates()
    running = trainer(tmp_path / "a", watch(), max_steps=2)
    running.fit(module, loader())
    running.save_checkpoint(tmp_path / "x.ckpt")
    callback = watch()
    other = trainer(tmp_path / "b", callback, max_steps=3)
    settings = {"weights_only": True} if LIGHTNING >= (2, 6) else {}  # an argument since then
    getattr(other, loop)(module, loader(8), ckpt_path=tmp_path / "x.ckpt", **settings)
    assert not [path for path in files(tmp_path / "b") if "attn_monitor" in str(path)]
    other.fit(Evaluates(), loader())  # from the start
    assert steps(tmp_path / "b") == [0, 1, 2, 3]


class Tunable(Distillation):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-3, 2

    def train_dataloader(self) -> DataLoader[Tensor]:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return loader(8, batch_size=self.batch_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student_backbone.parameters(), lr=self.lr)


def scale_batch_size(running: pl.Trainer, module: Tunable) -> None:
    assert Tuner(running).scale_batch_size(module, max_trials=2, steps_per_trial=1) == 4


def lr_find(running: pl.Trainer, module: Tunable) -> None:
    finder = Tuner(running).lr_find(module, num_training=5, update_attr=False)
    assert finder is not None
    assert len(finder.results["lr"]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("tune", [scale_batch_size, lr_find])
@pytest.mark.parametrize("probe", [None, torch.randn(2, 3, 32, 32)], ids=["adopted", "given"])
def test_tuners_leave_the_callback_as_it_was(tmp_path: Path, tune: Any, probe: Tensor | None) -> None:
    callback, module = watch(probe=probe), Tunable()
    running = trainer(tmp_path, callback, max_steps=3)
    tune(running, module)
    assert callback.kept.schedule.last_step is None
    assert callback.monitor is None or len(callback.monitor.history) == 0
    assert not [path for path in files(tmp_path) if "attn_monitor" in str(path)]
    assert not [key for key in running.callback_metrics if "attn" in key]
    running.fit(module)
    assert steps(tmp_path) == [0, 1, 2, 3]
    if probe is not None:
        assert callback.monitor is not None
        assert torch.equal(callback.monitor.probe.images, probe)


@pytest.mark.parametrize(
    "finder", [BatchSizeFinder(max_trials=2, steps_per_trial=1), LearningRateFinder(num_training_steps=5)],
    ids=["batch size", "learning rate"],
)  # fmt: skip
@pytest.mark.parametrize("first", sweep([True, False], quick=1), ids=["finder first", "finder last"])
def test_finders_as_callbacks(tmp_path: Path, finder: Any, first: bool) -> None:
    callbacks = [finder, watch()] if first else [watch(), finder]
    trainer(tmp_path, *callbacks, max_steps=3).fit(Tunable())
    assert steps(tmp_path) == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_fit_that_is_continued_goes_on_in_its_archive(tmp_path: Path) -> None:
    callback, module = watch(), Distillation()
    running = trainer(tmp_path, callback, max_steps=4)
    running.fit(module, loader())
    running.fit_loop.epoch_loop.max_steps = 8
    running.fit(module, loader())
    assert running.global_step == 8
    assert steps(tmp_path) == list(range(9))
    assert callback.monitor is not None
    assert [s.step for s in callback.monitor.history] == list(range(9))


@pytest.mark.slow
def test_a_fit_after_one_that_failed_at_once(tmp_path: Path) -> None:
    class Broken(Distillation):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("a mistake to mend")

    callback = watch()
    with pytest.raises(RuntimeError, match="a mistake to mend"):
        trainer(tmp_path / "a", callback).fit(Broken(), loader())
    trainer(tmp_path / "b", callback, max_steps=2).fit(Distillation(), loader())
    assert steps(tmp_path / "b") == [0, 1, 2]
