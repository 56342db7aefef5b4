"""A disk that does not answer, whichever call it is that hangs: training goes on, and `fit` ends in time."""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import pathlib
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from attn_monitor import AttentionMapCallback, load_snapshots
from attn_monitor.background import wait_budget
from attn_monitor.record import folder_claim as claim
from attn_monitor.record.folder_claim import CLAIM, claim_free
from attn_monitor.workers import Worker
from tests.support.helpers import Distillation, loader, trainer

CALLS = {
    **dict.fromkeys(("open", "listdir", "scandir", "stat", "lstat", "rename", "replace", "mkdir", "unlink"), os),
    **dict.fromkeys(("rmdir", "fsync", "fstat", "statvfs", "write", "read", "close", "readlink"), os),
    "io.open": io,
    "lockf": fcntl,
}


class HangingDisk:
    """Calls of one function hang once ``hangs`` is set, for paths below a folder and for its open files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.folder, self.hangs, self.release = str(folder), threading.Event(), threading.Event()
        self.on_training_thread: list[str] = []
        self.calls = 0
        owner: Any = CALLS[name]
        real = getattr(owner, name.rpartition(".")[2])
        monkeypatch.setattr(owner, name.rpartition(".")[2], self._instead_of(real))
        if name == "io.open":
            monkeypatch.setattr(builtins, "open", self._instead_of(real))
        accessor: Any = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps the functions of os in it
        if getattr(accessor, name, None) is real:
            monkeypatch.setattr(accessor, name, staticmethod(self._instead_of(real)))

    def _instead_of(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            if self.hangs.is_set() and args and self._is_there(args[0]):
                self.calls += 1
                if threading.current_thread() is threading.main_thread():
                    self.on_training_thread.append(f"{real.__name__}({args[0]})")
                else:
                    self.release.wait(60)
            return real(*args, **settings)

        return call

    def _is_there(self, place: Any) -> bool:
        if isinstance(place, int):
            try:
                place = os.path.abspath(f"/proc/self/fd/{place}")
                place = _readlink(place)
            except OSError:
                return False
        elif not isinstance(place, (str, os.PathLike)):
            return False
        return os.path.abspath(os.fspath(place)).startswith(self.folder)


_readlink = os.readlink


@pytest.fixture
def let_go() -> Iterator[list[HangingDisk]]:
    """Disks that answer again in the end, so that the threads end."""
    disks: list[HangingDisk] = []
    yield disks
    for disk in disks:
        disk.release.set()
    for thread in threading.enumerate():
        if isinstance(thread, Worker):
            thread.join(20)


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RUN_SECONDS", 1.0), ("DISK_SECONDS", 0.3), ("EXCEPTION_SECONDS", 0.3)):
        monkeypatch.setattr(wait_budget, name, seconds)


class At(pl.Callback):
    """Does something after a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act()


def fit(folder: Path, *callbacks: pl.Callback, **changes: Any) -> list[str]:
    """A run whose only files are the archive's; what was told."""
    watch = AttentionMapCallback(num_images=2, every_n_train_steps=1, dirpath=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running = trainer(folder.parent / "else", watch, *callbacks, logger=False, max_steps=3, **changes)
        running.fit(Distillation(), loader())
    return [str(w.message) for w in caught if "AttentionMapCallback" in str(w.message)]


@pytest.mark.slow
@pytest.mark.usefixtures("little_patience")
@pytest.mark.parametrize("begins", ["at once", "at the end"])
@pytest.mark.parametrize("name", CALLS)
def test_every_call_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, let_go: list[HangingDisk], name: str, begins: str
) -> None:
    folder = tmp_path / "archive"
    disk = HangingDisk(folder, monkeypatch, name)
    let_go.append(disk)
    started: list[float] = []

    def hang() -> None:
        disk.hangs.set()
        started.append(time.monotonic())

    if begins == "at once":
        hang()
        fit(folder)
    else:
        fit(folder, At(3, hang))
    assert time.monotonic() - started[0] < 60  # a first look on a busy machine included
    assert disk.on_training_thread == []


@pytest.mark.usefixtures("little_patience")
def test_a_disk_that_hangs_when_the_run_begins_and_then_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, let_go: list[HangingDisk]
) -> None:
    """The archive is complete, in a folder with a name of its own; the one that was asked for is free again."""
    folder = tmp_path / "archive"
    disk = HangingDisk(folder, monkeypatch, "mkdir")
    let_go.append(disk)
    disk.hangs.set()
    monkeypatch.setattr(wait_budget, "RUN_SECONDS", 20.0)
    fit(folder, At(1, disk.release.set))
    (archive,) = (path for path in tmp_path.glob("archive*") if list(path.glob("step-*.npz")))
    assert archive.name.startswith("archive-")
    assert [s.step for s in load_snapshots(archive)] == [0, 1, 2, 3]
    assert (archive / CLAIM).exists()


# A folder that is deleted in mid-run


def test_a_deleted_archive_is_made_again_with_its_claim(tmp_path: Path) -> None:
    mine = claim_free(tmp_path, "x")
    (mine.folder / "probe.npz").touch()
    mine.renew()
    assert len((mine.folder / CLAIM).read_text().splitlines()) == 1, "nothing to do"
    shutil.rmtree(mine.folder)
    mine.renew()
    (mine.folder / "probe.npz").touch()
    assert claim_free(tmp_path, "x").folder.name == "x-2"
    assert claim.claim_to_fill(mine.folder) is None, "it is written to"
    mine.release()
    again = claim.claim_again(mine.folder, mine.run)
    assert again is not None


def test_a_deleted_archive_that_another_run_took_is_left_to_it(tmp_path: Path) -> None:
    mine = claim_free(tmp_path, "x")
    shutil.rmtree(mine.folder)
    other = claim_free(tmp_path, "x")
    assert other.folder == mine.folder
    with pytest.raises(FileExistsError, match="is another run's now"):
        mine.renew()


def test_a_folder_that_could_not_be_made_is_claimed_when_it_is(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("in the way")
    mine = claim_free(tmp_path / "root", "x")
    with pytest.raises(OSError, match="root"):
        mine.renew()
    (tmp_path / "root").unlink()
    mine.renew()
    assert (mine.folder / CLAIM).exists()
    assert claim.claim_to_fill(mine.folder) is None
