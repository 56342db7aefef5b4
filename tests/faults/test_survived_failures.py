"""Batches that cannot be searched, data that fail, and trainings that end early cost a warning, not the run."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionMapCallback, Watch, load_snapshots, record_attention
from attn_monitor.environment import AttentionMapFromEnvironment
from attn_monitor.errors import ArgumentError
from attn_monitor.hugging_face import AttentionMapTrainerCallback
from attn_monitor.train import process_copy
from attn_monitor.train.batch_images import find_images
from attn_monitor.train.lightning_images import LightningImages
from attn_monitor.train.process_copy import CopyError, call_in_fork
from tests.support.helpers import Distillation, loader, tiny_vit, trainer

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no copy of a process to ask")


class Lazy(Mapping[str, Any]):
    """A field of it cannot be read."""

    def __iter__(self) -> Iterator[str]:
        return iter(["missing"])

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: str) -> Any:
        raise FileNotFoundError("lazy field")


class Chained:
    """A batch that Lightning does not look into."""

    def __init__(self, image: Tensor, rest: Any) -> None:
        self.image, self.rest = image, rest

    def to(self, *args: Any, **kwargs: Any) -> Chained:
        return self


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(IMAGES)


class Validated(Distillation):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def chain(length: int) -> SimpleNamespace:
    first = node = SimpleNamespace()
    for _ in range(length):
        node.next = SimpleNamespace()
        node = node.next
    return first


def test_images_behind_a_long_chain_of_objects() -> None:
    last = chain(5000)
    node = last
    while vars(node):
        node = node.next
    node.image = IMAGES
    assert find_images(last) is IMAGES
    assert find_images(chain(20_000)) is None


@pytest.mark.parametrize("rest", ["lazy", "chain"])
def test_a_batch_of_the_sanity_check_that_cannot_be_searched(tmp_path: Path, rest: str) -> None:
    def collate(images: list[Tensor]) -> Chained:
        return Chained(torch.stack(images), Lazy() if rest == "lazy" else chain(600))

    validation = DataLoader(Stream(), batch_size=2, collate_fn=collate)
    callback = AttentionMapCallback()
    if rest == "lazy":
        validation = DataLoader(Stream(), batch_size=2, collate_fn=lambda _: SimpleNamespace(fields=Lazy()))
        with pytest.warns(UserWarning, match="finding images in the sanity check"):
            trainer(tmp_path, callback, max_steps=2).fit(Validated(), DataLoader(Stream(), batch_size=2), validation)
    else:
        trainer(tmp_path, callback, max_steps=2).fit(Validated(), DataLoader(Stream(), batch_size=2), validation)
    assert [s.step for s in load_snapshots(next(tmp_path.rglob("attn_monitor")))][-1] == 2


def test_the_first_batch_is_watched_if_no_image_of_the_data_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no such data")

    monkeypatch.setattr(LightningImages, "of_data_sets", fail)
    with pytest.warns(UserWarning, match="finding images of the data.*no such data"):
        trainer(tmp_path, AttentionMapCallback(), max_steps=2).fit(Distillation(), loader())
    assert [s.step for s in load_snapshots(next(tmp_path.rglob("attn_monitor")))][-1] == 2


def test_epochs_without_images_are_no_failure(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_vit()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net.norm.weight.sum() * batch.mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    numbers = DataLoader(torch.ones(8, 4), batch_size=2)  # type: ignore[arg-type]
    running = trainer(tmp_path, AttentionMapCallback(every_n_epochs=1), max_epochs=2, max_steps=-1)
    running.fit(Model(), numbers)
    texts = [str(w.message) for w in recwarn]
    assert not [text for text in texts if "AssertionError" in text]
    recwarn.clear()


def test_the_default_dtype_changes_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_vit().eval()
    expected = record_attention(model, IMAGES)
    training, data = Distillation(), loader()
    torch.set_default_dtype(torch.float64)
    try:
        trainer(tmp_path, AttentionMapCallback(IMAGES * 1.1), max_steps=2).fit(training, data)
        found = record_attention(model, IMAGES)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [s.step for s in load_snapshots(next(tmp_path.rglob("attn_monitor")))] == [0, 1, 2]
    for layer, other in zip(expected, found, strict=True):
        torch.testing.assert_close(layer.rows, other.rows, check_dtype=False)
    assert not [str(w.message) for w in recwarn if "Attention" in str(w.message)]


def test_arguments_that_are_invalid(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="disk_reserve=-1"):
        AttentionMapCallback(disk_reserve=-1)
    callbacks = [AttentionMapCallback(name="same", query=query) for query in ("cls", "mean")]
    with pytest.raises(ArgumentError, match="name='same': 2"):
        trainer(tmp_path, *callbacks).fit(Distillation(), loader())


def test_a_callback_of_the_environment_takes_no_place(tmp_path: Path) -> None:
    idle, own = AttentionMapFromEnvironment(), AttentionMapCallback()
    running, model = trainer(tmp_path, idle, own), Distillation()
    running.strategy.connect(model)
    for callback in (idle, own):
        callback.setup(running, model, "fit")
    assert not idle.active
    assert own.run is not None
    assert (own.run.name, own.run.checks_ema) == ("", True)
    own.teardown(running, model, "fit")


@linux
def test_what_fails_in_a_fork_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        raise SystemExit("the data give up")

    with pytest.raises(CopyError, match="SystemExit: the data give up"):
        call_in_fork(leave)

    def fail(libc: Any) -> None:
        raise CopyError("shared memory cannot be copied: no room")

    monkeypatch.setattr(process_copy, "_take_memory", fail)
    with pytest.raises(CopyError, match="no room"):
        call_in_fork(lambda: 1)


@linux
def test_a_fork_that_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kill = os.kill
    monkeypatch.setattr(process_copy, "END_SECONDS", 0.2)
    forks: list[int] = []
    monkeypatch.setattr(os, "kill", lambda process, _: forks.append(process))
    started = time.monotonic()
    with pytest.raises(CopyError, match="no answer"):
        call_in_fork(lambda: time.sleep(60), seconds=0.1)
    assert time.monotonic() - started < 20
    kill(forks[0], 9)
    for _ in range(200):
        if not Path(f"/proc/{forks[0]}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{forks[0]}").exists()  # reaped


def begin(callback: AttentionMapTrainerCallback, folder: Path) -> tuple[Any, Any]:
    args = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=None, report_to=["tensorboard"])
    state = SimpleNamespace(global_step=0, max_steps=4, epoch=0.0, is_world_process_zero=True)
    callback.on_train_begin(args, state, None, model=tiny_vit())
    return args, state


def test_a_second_training_after_an_interrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[SummaryWriter] = []

    def opened(folder: str) -> SummaryWriter:
        writers.append(SummaryWriter(folder))
        return writers[-1]

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", opened)
    callback, before = AttentionMapTrainerCallback(IMAGES), threading.active_count()
    begin(callback, tmp_path)
    first = callback.watch
    args, state = begin(callback, tmp_path)
    assert first is not None
    assert not first.active
    assert [writer.file_writer is None for writer in writers] == [True, False]  # the first is closed
    with pytest.warns(UserWarning, match="does not exist") as caught:  # noqa: PT031 - once in both
        callback.on_save(args, state, None)
        callback.on_save(args, state, None)
    assert len(caught) == 1
    callback.on_train_end(args, state, None)
    assert [writer.file_writer is None for writer in writers] == [True, True]
    assert threading.active_count() <= before


def test_a_watch_ends_with_its_block(tmp_path: Path) -> None:
    model: nn.Module = tiny_vit()
    with Watch(model, IMAGES, folder=tmp_path / "1") as watch:
        watch.step(0)
    assert not watch.active
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Watch(model, IMAGES, folder=tmp_path / "2") as watch:  # noqa: PT012
        watch.step(0)
        raise KeyboardInterrupt
    assert not watch.active
    assert threading.active_count() <= before
    for folder in ("1", "2"):
        assert [s.step for s in load_snapshots(tmp_path / folder / "attn_monitor")] == [0]
