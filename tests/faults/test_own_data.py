"""Data sets and collate functions that hold a state of their own: training ends as it does without the monitor."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from attn_monitor import AttentionMapCallback, Watch
from attn_monitor.train import process_copy
from attn_monitor.train.probe_search import probe_from_loaders
from attn_monitor.train.process_copy import CopyError, call_in_fork
from tests.support.helpers import Distillation, NoiseImages, tiny_vit, trainer
from tests.support.tiers import sweep

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no copy of a process to ask")
MODULE_GENERATOR = np.random.default_rng(0)


class Augmented(Dataset[Tensor]):
    """Noise images, brightened by a number from a source that remembers: each access gives others."""

    def __init__(self, draw: Callable[[int], float]) -> None:
        self.images, self.draw = NoiseImages().images, draw

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index] + self.draw(index)


class SeededCompose:
    """As Albumentations holds its randomness: a generator and a `random.Random` of its own, made from a seed."""

    def __init__(self, seed: int) -> None:
        self.py_random, self.random_generator = random.Random(seed), np.random.default_rng(seed)

    def __call__(self, index: int) -> float:
        return self.py_random.random() + float(self.random_generator.uniform())


class Randomizable:
    """As MONAI's transforms: one `RandomState` R of each."""

    def __init__(self) -> None:
        self.R = np.random.RandomState(0)

    def __call__(self, index: int) -> float:
        return float(self.R.uniform())


class Cache:
    """Augments an image once, and keeps what came out."""

    def __init__(self) -> None:
        self.kept: dict[int, float] = {}

    def __call__(self, index: int) -> float:
        if index not in self.kept:
            self.kept[index] = float(np.random.rand())  # noqa: NPY002
        return self.kept[index]


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, index: int) -> float:
        self.calls += 1
        return math.sin(self.calls)


class SharedCounter:
    def __init__(self) -> None:
        self.calls = multiprocessing.Value("i", 0)

    def __call__(self, index: int) -> float:
        with self.calls.get_lock():
            self.calls.value += 1
            return math.sin(self.calls.value)


class SharedTensor:
    """A counter in a tensor that worker processes share."""

    def __init__(self) -> None:
        self.calls = torch.zeros(1).share_memory_()

    def __call__(self, index: int) -> float:
        self.calls += 1
        return math.sin(float(self.calls))


class BigCache:
    """A cache in shared memory that is too large to be copied."""

    def __init__(self) -> None:
        self.kept = torch.full((process_copy.COPIED // 4 + 1,), torch.nan).share_memory_()

    def __call__(self, index: int) -> float:
        if self.kept[index].isnan():
            self.kept[index] = float(np.random.rand())  # noqa: NPY002
        return float(self.kept[index])


class OpenFile:
    """Numbers that are read one after the other."""

    def __init__(self, folder: Path) -> None:
        path = folder / "numbers.bin"
        path.write_bytes(np.random.default_rng(0).random(10_000).tobytes())
        self.file = path.open("rb", buffering=0)

    def __call__(self, index: int) -> float:
        return float(np.frombuffer(self.file.read(8))[0])


class DiskCache:
    """Augments once, and writes what came out to a file: by Python, or by compiled code."""

    def __init__(self, folder: Path, save: Callable[[Any, Path], object]) -> None:
        self.folder, self.save = folder, save

    def __call__(self, index: int) -> float:
        path = self.folder / f"{index}.pt"
        if not path.exists():
            self.save(torch.tensor(np.random.rand()), path)  # noqa: NPY002
        return float(torch.load(path))


def save_by_python(value: Tensor, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(value, file)


class Managed:
    """A counter in the process of a manager."""

    def __init__(self, manager: SyncManager) -> None:
        self.state = manager.dict(calls=0)

    def __call__(self, index: int) -> float:
        self.state["calls"] += 1
        return math.sin(self.state["calls"])


def module_generator(index: int) -> float:
    return float(MODULE_GENERATOR.uniform())


def closure() -> Callable[[int], float]:
    calls = 0

    def draw(index: int) -> float:
        nonlocal calls
        calls += 1
        return math.sin(calls)

    return draw


def numpy_generator() -> Callable[[int], float]:
    generator = np.random.default_rng(0)
    return lambda index: float(generator.uniform())


def python_generator() -> Callable[[int], float]:
    generator = random.Random(0)
    return lambda index: generator.random()


def torch_generator() -> Callable[[int], float]:
    generator = torch.Generator().manual_seed(0)
    return lambda index: float(torch.rand(1, generator=generator))


SOURCES: dict[str, Callable[[], Callable[[int], float]]] = {
    "np.random.Generator": numpy_generator,
    "random.Random": python_generator,
    "torch.Generator": torch_generator,
    "a seeded Compose": lambda: SeededCompose(0),
    "Randomizable": Randomizable,
    "a cache": Cache,
    "a counter": Counter,
    "a shared counter": SharedCounter,
    "a shared tensor": SharedTensor,
    "a generator of the module": lambda: module_generator,
    "a closure": closure,
}


class MaskCollator:
    """As I-JEPA's: a counter that all workers share seeds the masks of each batch."""

    def __init__(self) -> None:
        self._itr_counter = multiprocessing.Value("i", -1)

    def step(self) -> int:
        with self._itr_counter.get_lock():
            self._itr_counter.value += 1
            return int(self._itr_counter.value)

    def __call__(self, batch: list[Tensor]) -> Tensor:
        mask = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(self.step())) > 0.3
        images: Tensor = default_collate(batch)
        return images * mask.repeat_interleave(8, 2).repeat_interleave(8, 3)


def batches(draw: Callable[[int], float], workers: int, look: bool) -> list[Tensor]:
    """All that a loader gives, in two epochs, after and between looks at its data."""
    global MODULE_GENERATOR
    MODULE_GENERATOR = np.random.default_rng(0)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    loader, given = DataLoader(Augmented(draw), 4, num_workers=workers, shuffle=True), []
    for _ in range(2):
        if look:
            probe = probe_from_loaders(loader, 8)
            assert probe is not None
            assert len(probe) == 8
        given += list(loader)
    return given


@pytest.mark.parametrize("workers", sweep([0, 1], quick=1))
@pytest.mark.parametrize("source", SOURCES)
def test_states_of_data_sets(source: str, workers: int) -> None:
    plain, watched = (batches(SOURCES[source](), workers, look) for look in (False, True))
    assert all(map(torch.equal, plain, watched))
    first, second = (batches(SOURCES[source](), workers, False)[i] for i in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:AttentionMapCallback. this Trainer has no logger")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_that_counts(tmp_path: Path, workers: int) -> None:
    ends = []
    for name, callbacks in (("plain", []), ("watched", [AttentionMapCallback(dirpath=tmp_path / "archive")])):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        collate, model = MaskCollator(), Distillation()
        data = DataLoader(NoiseImages(), 4, num_workers=workers, collate_fn=collate)
        trainer(tmp_path / name, *callbacks, max_steps=3, logger=False).fit(model, data)
        ends.append((collate._itr_counter.value, model.state_dict()))
    (plain_count, plain), (watched_count, watched) = ends
    assert plain_count == watched_count > 0
    assert all(torch.equal(plain[k], watched[k]) for k in plain)


def test_a_file_that_is_read_on(tmp_path: Path) -> None:
    given = []
    for look in (False, True):
        numbers = OpenFile(tmp_path)
        given.append(batches(numbers, 0, look))
        numbers.file.close()
    assert all(map(torch.equal, *given))


@pytest.mark.parametrize("save", [save_by_python, torch.save])
def test_a_cache_on_disk_is_not_filled(tmp_path: Path, save: Callable[[Any, Path], object]) -> None:
    with pytest.raises(RuntimeError, match=r"the data write to|[Pp]ermission|cannot be opened"):
        probe_from_loaders(DataLoader(Augmented(DiskCache(tmp_path, save))), 8)
    assert not list(tmp_path.iterdir())


def test_a_cache_in_shared_memory_that_cannot_be_copied() -> None:
    cache = BigCache()
    with pytest.raises(CopyError, match=r"ended by SIG(SEGV|BUS)"):
        probe_from_loaders(DataLoader(Augmented(cache)), 8)
    assert bool(cache.kept.isnan().all())
    cache.kept[:] = 1.0
    assert probe_from_loaders(DataLoader(Augmented(cache)), 8) is not None  # it is only read


def test_a_state_in_another_process() -> None:
    with multiprocessing.Manager() as manager:
        managed = Managed(manager)
        for connected in (False, True):
            if connected:
                assert managed(0) == math.sin(1)
            with pytest.raises(CopyError, match="pipes and connections lead nowhere"):
                probe_from_loaders(DataLoader(Augmented(managed)), 8)
            assert managed.state["calls"] == connected


def test_what_a_copy_says_and_does_stays_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    left, right = socket.socketpair()
    log = (tmp_path / "log").open("w")

    def question() -> int:
        print("out"), print("err", file=sys.stderr)
        os.environ["ASKED"] = "yes"
        return os.getpid()

    def send() -> None:
        left.send(b"x")

    def write() -> None:
        log.write("x"), log.flush()

    assert call_in_fork(question) != os.getpid()
    for harmful in (send, write):
        with pytest.raises(CopyError, match=r"Errno"):
            call_in_fork(harmful)
    right.setblocking(False)
    with pytest.raises(BlockingIOError):
        right.recv(1)
    log.close(), left.close(), right.close()
    assert (tmp_path / "log").read_text() == ""
    assert "ASKED" not in os.environ
    assert capfd.readouterr() == ("", "")


def children() -> set[str]:
    """This process's own; earlier tests may have left some that wait, such as a resource tracker."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_no_answer_and_no_process_left() -> None:
    before = children()
    with pytest.raises(CopyError, match="no answer within 0 s"):
        call_in_fork(lambda: time.sleep(60), seconds=0.2)
    with pytest.raises(CopyError, match="ended by SIGKILL"):
        call_in_fork(lambda: os.kill(os.getpid(), 9))
    with pytest.raises(CopyError, match="OddError: no pickle"):
        call_in_fork(raise_odd)
    assert children() == before


def raise_odd() -> None:
    class OddError(Exception):
        pass

    raise OddError("no pickle")


class Counted(IterableDataset[Tensor]):
    """A stream that goes on where it was."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.at += 1
            yield torch.full((3, 32, 32), float(self.at))


def test_a_stream_that_is_given_is_not_used_up(tmp_path: Path) -> None:
    stream = Counted()
    watch = Watch(tiny_vit(), DataLoader(stream, 4), folder=tmp_path)
    watch.step(0)
    watch.close()
    assert watch.monitor is not None
    assert watch.monitor.probe.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert stream.at == 0
