"""What failed is said with its own reason, and what was lost by it by its steps."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attn_monitor import AttentionMapCallback, load_snapshots, record_attention
from attn_monitor.background.disk_reserve import DiskReserveError, require_space
from attn_monitor.distributed import is_out_of_memory
from attn_monitor.errors import ForwardError
from tests.support.helpers import Distillation, loader, tiny_vit, trainer


class Deletes(pl.Callback):
    """Deletes the archive before a step, once that is written."""

    def __init__(self, watch: AttentionMapCallback, folder: Path) -> None:
        self.watch, self.folder = watch, folder

    def on_train_batch_end(self, running: pl.Trainer, *_: Any) -> None:
        if running.global_step == 3:
            publisher = self.watch.run.output.publisher
            assert publisher is not None
            assert publisher.drain()
            shutil.rmtree(self.folder)


@pytest.mark.slow
def test_steps_of_a_deleted_archive_are_missing(tmp_path: Path) -> None:
    watch = AttentionMapCallback(every_n_train_steps=1, dirpath=tmp_path / "archive")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, watch, Deletes(watch, tmp_path / "archive"), max_steps=6).fit(Distillation(), loader())
    said = [str(w.message) for w in told]
    assert any("was deleted in mid-run, with what it held" in text for text in said), said
    assert "AttentionMapCallback: writing the archive works again; missing: steps 0, 1, 2" in said
    assert [s.step for s in load_snapshots(tmp_path / "archive")] == [3, 4, 5, 6]


class Asks(Dataset[Tensor]):
    """Its samples come over a pipe, as from a server of the user's."""

    def __init__(self) -> None:
        self.ours, self.theirs = multiprocessing.Pipe()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        self.theirs.send(torch.full((3, 32, 32), index / 16).numpy())
        return torch.from_numpy(self.ours.recv())


@pytest.mark.slow
def test_data_that_a_copy_cannot_ask_are_not_said_to_be_tried_again(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="finding a training crop failed") as told:
        trainer(tmp_path, AttentionMapCallback(), max_steps=2).fit(Distillation(), DataLoader(Asks(), 4))
    (said,) = [str(w.message) for w in told if "finding a training crop" in str(w.message)]
    assert "in it no file can be written, and pipes and connections lead nowhere" in said
    assert "retried" not in said
    assert len(load_snapshots(next(tmp_path.rglob("attn_monitor")))) == 3


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a file system without a size, which Linux has")
def test_where_nothing_can_be_written_the_disk_is_not_said_to_be_full() -> None:
    require_space(Path("/proc/attn_monitor"), 1000, None)  # no DiskReserveError: writing itself says why


def test_a_small_file_that_does_not_fit_beside_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much is free as is to stay so: the message says what the file would take of it, and what to do."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=705_000))
    with pytest.raises(
        DiskReserveError, match=r"^0\.7 MB are free in .*, 12\.0 KB are to be written, and .* 0\.7 MB\."
    ):
        require_space(tmp_path, 12_000, 700_000)
    require_space(tmp_path, 12_000, 690_000)  # a smaller reserve, as the message advises


def test_one_exception_that_is_raised_again_and_again() -> None:
    """A user's module may keep its exception, which then has what was raised from it before in its own chain."""
    error = KeyError("deliberate")

    def fail(*_: Any) -> None:
        raise error

    model = tiny_vit()
    model.blocks[0].register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(ForwardError, match="KeyError: 'deliberate'"):
            record_attention(model, torch.randn(2, 3, 32, 32))
    error.__cause__ = ValueError("of it")
    error.__cause__.__cause__ = error
    assert not is_out_of_memory(error)
