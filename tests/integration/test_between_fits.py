"""Between fits a callback is settings and state: it can be copied and pickled, holds no model, and runs no thread."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from attn_monitor import (
    AttentionError,
    AttentionMapCallback,
    AttentionMonitor,
    DrawingOptions,
    ProbeBatch,
    load_snapshots,
)
from attn_monitor.train.kept import STATE_VERSION
from tests.support import forwards
from tests.support.helpers import Distillation, loader, trainer
from tests.support.tiers import sweep

RUN = Path("run") / "version_0"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:.*no answer from TensorBoardLogger"),  # of a machine that is busy otherwise
]


class Failing(Distillation):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise RuntimeError("the user's own mistake")
        return super().training_step(batch, batch_idx)


class Refused(pl.Callback):
    """Ends a run before its first step."""

    def on_train_start(self, *_: Any) -> None:
        raise RuntimeError("the user's own mistake")


def fit(folder: Path, watch: AttentionMapCallback, how: str) -> weakref.ref[Distillation]:
    """A fit that ends in one of several ways; nobody keeps its model."""
    module = Failing() if how == "failed" else Distillation()
    callbacks = [watch, Refused()] if how == "failed at the start" else [watch]
    running = trainer(folder, *callbacks, max_steps=3)
    if how == "finished":
        running.fit(module, loader(), loader(8))
    else:
        with pytest.raises(RuntimeError, match="own mistake"):
            running.fit(module, loader(), loader(8))
    if how == "finished, then tested":
        running.validate(module, loader(8))
    return weakref.ref(module)


WAYS = ["finished", "failed", "failed at the start"]


@pytest.mark.parametrize("how", sweep(WAYS, quick=1))
@pytest.mark.parametrize("probe", sweep([torch.randn(2, 3, 32, 32), None], quick=1), ids=["given", "adopted"])
def test_after_any_fit_it_can_be_copied_and_trained_with(tmp_path: Path, how: str, probe: Tensor | None) -> None:
    watch = AttentionMapCallback(probe, every_n_train_steps=1, layers="all", drawing=DrawingOptions(heads=[0]))
    fit(tmp_path / "a", watch, how)
    for number, other in enumerate([copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))]):
        trainer(tmp_path / str(number), other, max_steps=2).fit(Distillation(), loader(), loader(8))
        assert [s.step for s in load_snapshots(tmp_path / str(number) / RUN / "attn_monitor")] == [0, 1, 2]


@pytest.mark.parametrize("how", WAYS)
def test_after_any_fit_the_model_is_gone_and_so_are_the_threads(tmp_path: Path, how: str) -> None:
    watch = AttentionMapCallback(every_n_train_steps=1, on_error="warn")
    model = fit(tmp_path, watch, how)
    gc.collect()
    assert model() is None
    assert not [t.name for t in threading.enumerate() if "attn_monitor" in t.name]
    assert watch.monitor is None or watch.monitor.found() == {}


def test_a_model_that_failed_is_let_go_too() -> None:
    """Its error has a traceback, whose frames hold the model."""
    monitor = AttentionMonitor(ProbeBatch(torch.randn(2, 3, 32, 32)))
    model = nn.Linear(3, 3)  # takes no images
    with pytest.raises(AttentionError):
        monitor.check({"backbone": model})
    assert monitor.failed
    monitor.let_go()
    released = weakref.ref(model)
    del model
    gc.collect()
    assert released() is None


def test_in_a_step_it_can_be_copied(tmp_path: Path) -> None:
    """A copy has no run, and can watch one of its own."""
    copies: list[AttentionMapCallback] = []

    class Copying(Distillation):
        def on_train_batch_end(self, *_: Any) -> None:
            super().on_train_batch_end()
            copies.append(copy.deepcopy(watch))

    watch = AttentionMapCallback(torch.randn(2, 3, 32, 32), every_n_train_steps=1)
    trainer(tmp_path / "a", watch, max_steps=2).fit(Copying(), loader())
    assert [other.run for other in copies] == [None, None]
    assert all(other.kept.root is None for other in copies)
    trainer(tmp_path / "b", copies[0], max_steps=2).fit(Distillation(), loader())
    assert copies[0].monitor is not None
    assert [s.step for s in copies[0].monitor.history] == [0, 1, 2]


def test_before_any_fit_it_can_be_copied() -> None:
    watch = AttentionMapCallback(torch.randn(2, 3, 32, 32), forward=forwards.with_flag)
    for other in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert other.state_key == watch.state_key
        assert other.options.forward is forwards.with_flag


@pytest.mark.slow
def test_processes_that_are_spawned_get_it(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fit in this process: `ddp_spawn` pickles the trainer with all its callbacks."""
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    watch = AttentionMapCallback(every_n_train_steps=1)
    trainer(tmp_path / "a", watch, max_steps=1).fit(Distillation(), loader(), loader(8))
    running = trainer(tmp_path / "b", watch, max_steps=2, strategy="ddp_spawn", devices=2)
    running.fit(Distillation(), loader())
    assert [s.step for s in load_snapshots(tmp_path / "b" / RUN / "attn_monitor")] == [0, 1, 2]


@pytest.mark.slow
def test_the_folds_of_a_cross_validation(tmp_path: Path) -> None:
    """One callback, copied for each fold by people who write `copy.deepcopy(callbacks)`."""
    watch = AttentionMapCallback(every_n_train_steps=1)
    for fold in range(3):
        trainer(tmp_path / str(fold), copy.deepcopy(watch), max_steps=1).fit(Distillation(), loader(), loader(8))
        trainer(tmp_path / f"same{fold}", watch, max_steps=1).fit(Distillation(), loader(), loader(8))
        for name in (str(fold), f"same{fold}"):
            assert [s.step for s in load_snapshots(tmp_path / name / RUN / "attn_monitor")] == [0, 1]


@pytest.mark.slow
def test_a_copy_that_is_made_during_a_fit_takes_no_part_in_it(tmp_path: Path) -> None:
    copies: list[AttentionMapCallback] = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            copies.append(copy.deepcopy(watch))

    watch = AttentionMapCallback(every_n_train_steps=1)
    trainer(tmp_path / "a", watch, Copies(), max_steps=2).fit(Distillation(), loader(), loader(8))
    trainer(tmp_path / "b", copies[0], max_steps=1).fit(Distillation(), loader(), loader(8))
    assert [[s.step for s in load_snapshots(tmp_path / f / RUN / "attn_monitor")] for f in "ab"] == [[0, 1, 2], [0, 1]]


def without(key: str) -> Any:
    def change(state: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for part in path:
            state = state[part]
        del state[last]

    return change


CHANGES: dict[str, Any] = {
    "no monitor": without("monitor"),
    "no last step": without("last_step"),
    "no archive": without("archive"),
    "no health": without("monitor.health"),
    "no history": without("monitor.history"),
    "no probe": without("monitor.probe"),
    "no names": without("monitor.probe.names"),
    "another kind of history": lambda state: state["monitor"].update(history=[{"unknown": 1}]),
    "another kind of health": lambda state: state["monitor"]["health"].update(layers={"x": {"unknown": 1}}),
    "another kind of step": lambda state: state.update(last_step="seven"),
    "a later version": lambda state: state.update(version=STATE_VERSION + 1),
    "a version in words": lambda state: state.update(version="2.0"),
}


def changed_checkpoint(folder: Path, change: Any) -> Path:
    saved = ModelCheckpoint(folder / "ckpt", save_last=True, every_n_train_steps=2)
    watch = AttentionMapCallback(every_n_train_steps=1)
    trainer(folder, watch, saved, max_steps=2, enable_checkpointing=True).fit(Distillation(), loader(), loader(8))
    path = folder / "ckpt" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (v for k, v in checkpoint["callbacks"].items() if k.startswith("AttentionMapCallback"))
    change(state)
    torch.save(checkpoint, path)
    return path


@pytest.mark.filterwarnings("ignore:.*`torch.load` with `weights_only=False`:FutureWarning")  # Lightning's, 2.4
@pytest.mark.parametrize("name", sweep(CHANGES, quick=1))
def test_a_state_that_cannot_be_read_is_a_warning_and_a_fresh_start(tmp_path: Path, name: str) -> None:
    path = changed_checkpoint(tmp_path / "a", CHANGES[name])
    watch = AttentionMapCallback(every_n_train_steps=1, on_error="raise")
    running = trainer(tmp_path / "b", watch, max_steps=4)
    with pytest.warns(UserWarning, match="what the checkpoint holds of attention cannot be read"):
        running.fit(Distillation(), loader(), loader(8), ckpt_path=path)
    assert running.global_step == 4
    assert [s.step for s in load_snapshots(tmp_path / "b" / RUN / "attn_monitor")] == [2, 3, 4]
    assert watch.monitor is not None
    assert [s.step for s in watch.monitor.history] == [2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [lambda state: state.update(new=1), lambda state: state["monitor"].update(x=1)],
    ids=["an extra key", "an extra key within"],
)
def test_a_state_with_more_in_it_is_gone_on_with(tmp_path: Path, change: Any) -> None:
    path = changed_checkpoint(tmp_path / "a", change)
    watch = AttentionMapCallback(every_n_train_steps=1, on_error="raise")
    trainer(tmp_path / "b", watch, max_steps=4).fit(Distillation(), loader(), loader(8), ckpt_path=path)
    assert watch.monitor is not None
    assert [s.step for s in watch.monitor.history] == [0, 1, 2, 3, 4]
