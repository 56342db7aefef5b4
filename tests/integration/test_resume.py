"""Stopping and going on: the same images, no step twice, none missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from attn_monitor import AttentionMapCallback, ProbeBatch, load_snapshots
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, trainer
from tests.support.tiers import sweep

RUN = Path("run") / "version_0"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:AttentionMapCallback. this trainer has no logger"),
]


def steps(folder: Path) -> list[int]:
    return [s.step for s in load_snapshots(folder / RUN / "attn_monitor")]


def first_part(folder: Path, stop: int, watch: AttentionMapCallback | None) -> Path:
    """Train up to a step and save a checkpoint there; returns its path."""
    saved = ModelCheckpoint(folder / "ckpt", save_last=True, every_n_train_steps=stop)
    callbacks = [saved] if watch is None else [watch, saved]
    trainer(folder, *callbacks, max_steps=stop, enable_checkpointing=True).fit(Distillation(), loader(), loader(8))
    return folder / "ckpt" / "last.ckpt"


@pytest.mark.parametrize("stop", sweep([2, 1, 3, 4, 5], quick=1))
def test_same_folder_no_duplicate_and_none_missing(tmp_path: Path, stop: int) -> None:
    checkpoint = first_part(tmp_path, stop, AttentionMapCallback(every_n_train_steps=2))
    again = AttentionMapCallback(every_n_train_steps=2)
    trainer(tmp_path, again, max_steps=8).fit(Distillation(), loader(shuffle=True), ckpt_path=checkpoint)
    expected = sorted({0, 2, 4, 6, 8, stop})  # the first part's last step is always looked at
    assert steps(tmp_path) == expected
    logged = [s for s, _ in Events(tmp_path / RUN).scalars("attn/teacher/layer1/entropy")]
    assert logged == expected
    assert again.monitor is not None
    assert [s.step for s in again.monitor.history] == expected
    drift = [s for s, _ in Events(tmp_path / RUN).scalars("attn/teacher/layer1/drift")]
    assert drift == expected[1:]


def test_other_folder_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    first = AttentionMapCallback(every_n_train_steps=2)
    checkpoint = first_part(tmp_path / "a", 4, first)
    second = AttentionMapCallback(every_n_train_steps=2)
    trainer(tmp_path / "b", second, max_steps=8).fit(Distillation(), loader(shuffle=True), ckpt_path=checkpoint)
    assert steps(tmp_path / "b")[-2:] == [6, 8]
    assert first.monitor is not None
    assert second.monitor is not None
    assert torch.equal(first.monitor.probe.images, second.monitor.probe.images)
    assert [s.step for s in second.monitor.history] == [0, 2, 4, 6, 8]


@pytest.mark.slow
def test_checkpoint_of_other_arguments_is_told(tmp_path: Path) -> None:
    checkpoint = first_part(tmp_path / "a", 2, AttentionMapCallback())
    again = trainer(tmp_path / "b", AttentionMapCallback(layers=0), max_steps=4)
    with pytest.warns(UserWarning, match=r"checkpoint was made with .*'layers': -1.*starts afresh"):
        again.fit(Distillation(), loader(), ckpt_path=checkpoint)
    assert steps(tmp_path / "b") == [2, 3, 4]


@pytest.mark.slow
def test_another_probe_is_told_and_the_old_one_kept(tmp_path: Path) -> None:
    checkpoint = first_part(tmp_path / "a", 2, AttentionMapCallback())
    other = AttentionMapCallback(ProbeBatch(torch.randn(2, 3, 32, 32)))
    with pytest.warns(UserWarning, match=r"probe images of the checkpoint are shown \(image0, image1"):
        trainer(tmp_path / "b", other, max_steps=4).fit(Distillation(), loader(), ckpt_path=checkpoint)
    assert other.monitor is not None
    assert len(other.monitor.probe) == 8


@pytest.mark.slow
def test_checkpoint_from_before_the_callback(tmp_path: Path) -> None:
    checkpoint = first_part(tmp_path / "a", 2, None)
    trainer(tmp_path / "b", AttentionMapCallback(), max_steps=4).fit(Distillation(), loader(), ckpt_path=checkpoint)
    assert steps(tmp_path / "b") == [2, 3, 4]


@pytest.mark.slow
def test_checkpoint_loads_with_the_callback_removed(tmp_path: Path) -> None:
    checkpoint = first_part(tmp_path / "a", 2, AttentionMapCallback())
    without = trainer(tmp_path / "b", max_steps=4)
    without.fit(Distillation(), loader(), ckpt_path=checkpoint)
    assert without.global_step == 4


@pytest.mark.slow
def test_checkpoints_do_not_grow_with_the_run(tmp_path: Path) -> None:
    sizes = []
    for length in (30, 60):
        watch = AttentionMapCallback(every_n_train_steps=1)
        logger = CSVLogger(tmp_path / str(length))  # takes no pictures, so that none can be late
        trainer(tmp_path / str(length), watch, max_steps=length, logger=logger).fit(Distillation(), loader())
        torch.save(watch.state_dict(), tmp_path / "state.pt")
        sizes.append((tmp_path / "state.pt").stat().st_size)
    assert sizes[1] < 1.3 * sizes[0]
