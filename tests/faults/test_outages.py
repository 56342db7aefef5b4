"""Loggers that hang, fail and come back, disks that fill up, Ctrl-C at a bad moment: real runs, and what they keep."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from attn_monitor import AttentionMapCallback, ProbeBatch, load_snapshots
from attn_monitor.background import job_queue, wait_budget
from attn_monitor.draw import panels
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, trainer
from tests.support.tiers import sweep

RUN = Path("run") / "version_0"
ENTROPY = "attn/student/layer1/entropy"
PICTURES = "logging pictures to TensorBoardLogger"


class Mine(Logger):
    """A logger of one's own, in memory; ``act`` may hang or raise, and is called with what is logged."""

    def __init__(self, act: Callable[[str, int], object] = lambda what, step: None, folder: Path | None = None) -> None:
        super().__init__()
        self.act, self.folder = act, folder
        self.metrics: list[tuple[int, float]] = []
        self.images: list[tuple[int, str]] = []
        self.threads: set[int] = set()

    @property
    def name(self) -> str:
        return "run"

    @property
    def version(self) -> str:
        return "version_0"

    @property
    def log_dir(self) -> str | None:
        return None if self.folder is None else str(self.folder)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if ENTROPY in metrics:
            assert step is not None
            self.threads.add(threading.get_ident())
            self.act("metrics", step)
            self.metrics.append((step, metrics[ENTROPY]))

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.act(key, step)
        self.images.append((step, key))


class At(pl.Callback):
    """Does something after a step."""

    def __init__(self, **actions: Callable[[], object]) -> None:
        self.actions = {int(step.removeprefix("step")): action for step, action in actions.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.actions:
            self.actions.pop(trainer.global_step)()


class Waits(pl.Callback):
    """After each step, gives the background time to do what it can."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        time.sleep(0.05)


def fit(
    folder: Path, logger: Any, *callbacks: pl.Callback, steps: int = 6, watch: AttentionMapCallback | None = None
) -> tuple[list[str], float]:
    """A run with a snapshot at every step: what the monitor warned of, and the seconds it took."""
    torch.manual_seed(0)
    watch = watch or AttentionMapCallback(num_images=2, every_n_train_steps=1)
    running = trainer(folder, *callbacks, watch, logger=logger, max_steps=steps)
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            running.fit(Distillation(), loader())
        finally:
            taken = time.monotonic() - started
            told = [str(w.message).removeprefix("AttentionMapCallback: ") for w in caught]
            told = [text for text, w in zip(told, caught, strict=True) if "AttentionMapCallback" in str(w.message)]
            fit.told = told  # type: ignore[attr-defined] - for runs that end in an exception
    return told, taken


def archived(folder: Path) -> list[int]:
    return [s.step for s in load_snapshots(folder)]


def monitors_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("attn_monitor")]


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Set at the end, so that threads that hang on it end; and they do."""
    event = threading.Event()
    yield event
    event.set()
    for thread in monitors_threads():
        thread.join(20)
    assert not monitors_threads()


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RUN_SECONDS", 12.0), ("EXCEPTION_SECONDS", 1.0)):
        monkeypatch.setattr(wait_budget, name, seconds)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, free: int = 0) -> None:
    """Write until only so many bytes are free."""
    size = shutil.disk_usage(disk).free - free
    with open(disk / "ballast", "wb") as file:
        while size > 0:
            size -= file.write(b"\0" * min(size, 1 << 16))


# A logger that never answers


@pytest.mark.usefixtures("little_patience")
@pytest.mark.parametrize("hangs", sweep(["metrics", "attn_maps/image0"], quick=1))
def test_a_logger_that_never_answers(tmp_path: Path, release: threading.Event, hangs: str) -> None:
    """Training is not held, the others get everything, and the end says in one warning what is missing."""
    main, held = threading.get_ident(), []
    hung = Mine(lambda what, step: what == hangs and (held.append(threading.get_ident()), release.wait(120)))
    told, taken = fit(tmp_path, [hung, TensorBoardLogger(tmp_path, name="run", version=0)], steps=12)
    assert taken < 60
    assert held
    assert main not in held
    assert archived(next(tmp_path.rglob("attn_monitor"))) == [*range(13)]
    events = Events(tmp_path / RUN)
    assert [s for s, _ in events.scalars(ENTROPY)] == [*range(13)]
    assert len(events.encoded("attn_timelapse")) == 1
    ends = [text for text in told if "the run has ended" in text]
    assert len(ends) == 1
    assert "logging metrics to Mine: steps " in ends[0]
    assert "11, 12" in ends[0]
    assert "TensorBoardLogger" not in "".join(told)
    assert len(told) <= 4
    assert hung.metrics == ([] if hangs == "metrics" else [(0, hung.metrics[0][1])])


def test_the_patience_of_a_run_is_one_minute() -> None:
    assert wait_budget.RUN_SECONDS <= 60
    assert wait_budget.EXCEPTION_SECONDS <= 5


@pytest.mark.slow
@pytest.mark.usefixtures("little_patience")
def test_two_callbacks_share_the_patience(tmp_path: Path, release: threading.Event) -> None:
    hung = Mine(lambda what, step: release.wait(120))
    first, second = (AttentionMapCallback(num_images=2, every_n_train_steps=1, name=name) for name in ("a", "b"))
    patience: list[wait_budget.WaitBudget] = []
    at = At(step1=lambda: patience.extend(c.run.budget for c in (first, second)))
    fit(tmp_path, hung, first, at, steps=3, watch=second)
    assert patience[0] is patience[1]
    assert patience[0].left == 0
    both = [c for c in monitors_threads() if "Mine" in c.name]
    assert len(both) == 2
    assert sum("logging pictures to Mine: steps 0, " in text for text in fit.told) == 2, fit.told


@pytest.mark.usefixtures("little_patience")
@pytest.mark.parametrize("hangs", [True, False])
def test_a_users_own_exception_comes_at_once(
    tmp_path: Path, release: threading.Event, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the logger does; what was captured is in the archive, what is not logged is told, the threads end."""

    def fail() -> None:
        failed.append(time.monotonic())
        raise RuntimeError("the user's own mistake")

    monkeypatch.setattr(wait_budget, "RUN_SECONDS", 40.0)  # what an exception does not wait for
    failed: list[float] = []
    logger = Mine(lambda what, step: hangs and release.wait(120))
    with pytest.raises(RuntimeError, match="own mistake"):
        fit(tmp_path, logger, At(step4=fail))
    assert time.monotonic() - failed[0] < wait_budget.EXCEPTION_SECONDS + 15
    assert archived(next(tmp_path.rglob("attn_monitor"))) == [0, 1, 2, 3]
    if hangs:
        assert "logging metrics to Mine: steps 0, 1, 2, 3" in fit.told[-1]
    else:
        assert fit.told == []
        assert [s for s, _ in logger.metrics] == [0, 1, 2, 3]
        assert not monitors_threads()


def test_failures_are_told_when_an_exception_ends_the_run(tmp_path: Path) -> None:
    def break_archive() -> None:
        time.sleep(0.5)
        (archive,) = tmp_path.rglob("attn_monitor")
        shutil.rmtree(archive)
        archive.write_text("in the way")

    def fail() -> None:
        raise RuntimeError("the user's own mistake")

    with pytest.raises(RuntimeError, match="own mistake"):
        fit(tmp_path, TensorBoardLogger(tmp_path, name="run", version=0), At(step2=break_archive, step4=fail))
    assert "writing the archive failed" in fit.told[0]
    assert "writing the archive: steps 2, 3" in fit.told[-1]
    assert not monitors_threads()


# A logger that fails and comes back


def test_an_outage_of_a_logger_costs_no_metrics(tmp_path: Path) -> None:
    def unreachable(what: str, step: int) -> None:
        if away:
            raise ConnectionError("no route to host")

    away: list[bool] = []
    logger = Mine(unreachable)
    at = At(step3=lambda: away.append(True), step8=away.clear)
    told, _ = fit(tmp_path, logger, Waits(), at, steps=12)
    assert [s for s, _ in logger.metrics] == [*range(13)]
    assert [re.sub(r" \(will be.*", "", text) for text in told if "metrics" in text] == [
        "logging metrics to Mine failed, training goes on. ConnectionError: no route to host",
        "logging metrics to Mine works again; nothing is missing",
    ]
    assert (12, "attn_maps/image0") in logger.images


@pytest.mark.slow
def test_every_other_time_and_errors_of_alternating_types(tmp_path: Path) -> None:
    errors = [ConnectionError("a"), ValueError("b"), KeyError("c")]
    calls: list[int] = []

    def flap(what: str, step: int) -> None:
        calls.append(step)
        if len(calls) % 2:
            raise errors[len(calls) % 3]

    logger = Mine(flap)
    told, _ = fit(tmp_path, logger, steps=20)
    assert [s for s, _ in logger.metrics] == [*range(21)]
    assert len(told) <= 6


def test_a_logger_that_ends_its_thread(tmp_path: Path) -> None:
    """Whatever is raised, also where nothing was expected to raise, neither ends the writer nor the run."""

    class Exits(Mine):
        @property
        def log_dir(self) -> str | None:
            raise SystemExit(1) if threading.current_thread() is not threading.main_thread() else None

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            raise SystemExit(2)

    class Exits2(Mine):
        def log_image(self, key: str, images: list[Any], step: int) -> None:
            raise SystemExit(3)

    good = Mine()
    told, taken = fit(tmp_path, [good, Exits2()], steps=3)
    assert taken < 30
    assert "logging pictures to Exits2 failed, training goes on. SystemExit: 3" in told[0]
    assert [s for s, _ in good.metrics] == [0, 1, 2, 3]


def test_a_killed_process_of_a_logger(tmp_path: Path) -> None:
    """Its pipe breaks; the archive and the other logger have everything, and two lines say what is missing."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:

        def send(what: str, step: int) -> None:
            assert process.stdin is not None
            os.write(process.stdin.fileno(), f"{what} {step}\n".encode())

        good = Mine()
        piped = Mine(send)
        told, _ = fit(tmp_path, [piped, good], Waits(), At(step3=process.kill), steps=6)
    assert [s for s, _ in good.metrics] == [*range(7)]
    assert archived(next(tmp_path.rglob("attn_monitor"))) == [*range(7)]
    assert any("logging metrics to Mine failed, training goes on. BrokenPipeError" in text for text in told)
    assert re.search(r"logging metrics to Mine: steps .*6", told[-1])
    assert "Mine 2" not in "".join(told)


@pytest.mark.slow
def test_rows_of_csv_are_not_lost_to_a_second_thread(tmp_path: Path) -> None:
    class Watched(CSVLogger):
        def log_metrics(self, *args: Any, **settings: Any) -> None:
            threads.add(threading.get_ident())
            super().log_metrics(*args, **settings)

    threads: set[int] = set()
    logger = Watched(tmp_path, version=0, flush_logs_every_n_steps=1)
    told, _ = fit(tmp_path, logger, steps=40)
    assert told == []
    assert threads == {threading.get_ident()}
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    for column, count in (("loss", 40), (ENTROPY, 41)):
        assert sum(line.split(",")[columns.index(column)] != "" for line in lines[1:]) == count


def test_metrics_come_in_order_behind_training_and_at_once_in_callback_metrics(tmp_path: Path) -> None:
    class Checks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics[ENTROPY]))

    seen: list[float] = []
    logger = Mine(lambda what, step: time.sleep(0.01))
    fit(tmp_path, logger, Checks(), steps=8)
    assert [s for s, _ in logger.metrics] == [*range(9)]
    assert [v for _, v in logger.metrics][:8] == pytest.approx(seen)
    assert threading.get_ident() not in logger.threads


# Pictures that fail by themselves


def test_one_image_that_cannot_be_drawn_or_logged_is_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = panels.panel

    def panel(snapshot: Any, index: int, *args: Any, **settings: Any) -> Any:
        if index == 0:
            raise ValueError("cannot draw this one")
        return real(snapshot, index, *args, **settings)

    def refuse(what: str, step: int) -> None:
        if what == "attn_filmstrip/image2":
            raise OSError(36, "File name too long")

    monkeypatch.setattr(panels, "panel", panel)
    logger = Mine(refuse)
    watch = AttentionMapCallback(num_images=4, every_n_train_steps=1)
    told, _ = fit(tmp_path, logger, Waits(), steps=6, watch=watch)
    for step in range(7):
        so_far = {"attn_filmstrip/image0", "attn_filmstrip/image1", "attn_filmstrip/image3", "attn_overview/logits"}
        assert {key for s, key in logger.images if s == step} == {
            *("attn_maps/image1", "attn_maps/image2", "attn_maps/image3"),
            *(() if step == 4 else so_far),  # these at growing distances
        }
    which = "attn_maps/image0 and 1 more: ValueError: cannot draw this one"
    assert f"logging some pictures to Mine failed, training goes on. {which}" in told[0]
    assert told[1].endswith("this was not done:\n  logging some pictures to Mine: steps 0, 1, 2, 3, 4, 5, 6")
    assert len(told) == 2


@pytest.mark.filterwarnings("ignore:AttentionMapCallback. this trainer has no logger")
def test_names_of_eighty_wide_characters(tmp_path: Path) -> None:
    """Cut by bytes: every picture is written, for every kind of writer of files."""
    names = ["注" * 80, "注" * 79 + "意", "é" * 79 + "x", "a" * 300]
    probe = ProbeBatch(loader().dataset.images[:4], names=names)
    assert len(set(probe.names)) == 4
    assert all(len(name.encode()) <= 90 for name in probe.names)
    watch = AttentionMapCallback(probe, every_n_train_steps=1, name="注" * 26)
    told, _ = fit(tmp_path, False, steps=2, watch=watch)
    assert not [text for text in told if "no logger" not in text]
    (folder,) = tmp_path.rglob("pictures")
    assert len(list(folder.iterdir())) == 9  # a panel and a film strip of each, and logits


# Disks


@pytest.mark.slow
def test_an_archive_comes_back_after_its_disk_was_full(tmp_path: Path, disk: Path) -> None:
    """Full from step 10 to 20 of 40: nothing is missing, and it is said once each."""
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    archive = tmp_path / RUN / "attn_monitor"
    archive.mkdir(parents=True)
    archive.rmdir()
    archive.symlink_to(disk)
    watch = AttentionMapCallback(num_images=2, every_n_train_steps=1, disk_reserve=0)
    at = At(step10=lambda: (time.sleep(0.5), fill(disk)), step20=(disk / "ballast").unlink)
    told, _ = fit(tmp_path, logger, Waits(), at, steps=40, watch=watch)
    assert archived(disk) == [*range(41)]
    assert not list(disk.glob(".writing*"))
    assert len(told) == 2
    assert "writing the archive failed, training goes on. OSError: [Errno 28] No space left" in told[0]
    assert told[1] == "writing the archive works again; nothing is missing"


@pytest.mark.slow
def test_what_does_not_fit_in_memory_is_named(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "KEPT_BYTES", 20_000)
    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / "attn_monitor").symlink_to(disk)
    watch = AttentionMapCallback(num_images=2, every_n_train_steps=1, disk_reserve=0)
    at = At(step5=lambda: (time.sleep(0.5), fill(disk)), step25=(disk / "ballast").unlink)
    told, _ = fit(tmp_path, TensorBoardLogger(tmp_path, name="run", version=0), Waits(), at, steps=30, watch=watch)
    there = archived(disk)
    missing = sorted(set(range(31)) - set(there))
    assert missing
    assert missing[0] == 5
    assert there[-1] == 30
    assert any("writing the archive works again; missing: steps 5, 6, 7" in text for text in told)


@pytest.mark.slow
def test_the_last_of_a_disk_is_not_the_monitors(tmp_path: Path, disk: Path) -> None:
    """Everything pauses with one warning while less than the reserve is free, and goes on by itself."""
    free: list[int] = []
    reserve = 4_000_000

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            time.sleep(0.05)
            if 5 < trainer.global_step <= 15:
                free.append(shutil.disk_usage(disk).free)

    at = At(
        step5=lambda: (time.sleep(1), fill(disk, reserve)), step15=lambda: (time.sleep(4), (disk / "ballast").unlink())
    )
    watch = AttentionMapCallback(num_images=2, every_n_train_steps=1, disk_reserve=reserve)
    told, _ = fit(disk, TensorBoardLogger(disk, name="run", version=0), at, Looks(), steps=60, watch=watch)
    assert min(free) > reserve - 1_000_000  # scalars are still written, and what was begun before the disk was full
    assert archived(disk / RUN / "attn_monitor") == [*range(61)]
    assert [s for s, _ in Events(disk / RUN).scalars(ENTROPY)] == [*range(61)]
    pictures = [s for s, _ in Events(disk / RUN).images("attn_maps/image0")]
    assert not set(pictures) & set(range(7, 15))
    assert pictures[-1] == 60
    failed = [text for text in told if "disk_reserve is 4.0 MB" in text]
    # Where the reserve begins between two pictures of one snapshot, these are a part of their own.
    parts = {text.partition(" failed")[0].replace("some pictures", "pictures") for text in failed}
    assert parts == {"writing the archive", PICTURES}
    assert "writing the archive works again; nothing is missing" in told
    assert any("pictures to TensorBoardLogger works again; missing: step" in text for text in told)
    assert len(told) == 2 * len(failed) <= 6


@pytest.mark.slow
def test_a_run_on_a_small_disk_ends_as_it_would_alone(tmp_path: Path, disk: Path) -> None:
    """Pictures would fill it: by default they stop in time, and the run's own checkpoint has room."""

    def checkpoint() -> None:
        (disk / "checkpoint").write_bytes(b"\0" * 200_000)

    fill(disk, 900_000)
    watch = AttentionMapCallback(num_images=4, every_n_train_steps=1)
    told, _ = fit(disk, TensorBoardLogger(disk, name="run", version=0), At(step38=checkpoint), steps=40, watch=watch)
    assert (disk / "checkpoint").stat().st_size == 200_000
    assert [s for s, _ in Events(disk / RUN).scalars("loss")] == [*range(40)]
    assert "disk_reserve is 0.4 MB" in told[0]


@pytest.mark.parametrize("value", [-1, 0.5, True, "1 GB"])
def test_the_reserve_is_checked_at_once(value: Any) -> None:
    with pytest.raises(ValueError, match=r"disk_reserve=.*expected a number of bytes"):
        AttentionMapCallback(disk_reserve=value)


# Ctrl-C


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores SIGINT after the first: for the tests after this one, put it back.

    Its oldest releases warn of Ctrl-C and return, newer ones exit.
    """
    before = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected KeyboardInterrupt")
        yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("little_patience", "interruptible")
def test_the_archive_does_not_wait_for_the_network(
    tmp_path: Path, release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures hang, then Ctrl-C at step 3: all snapshots are there, and what is written last is said."""
    hung = Mine(lambda what, step: what.startswith("attn") and release.wait(120))
    with caplog.at_level("INFO"), suppress(SystemExit):
        fit(tmp_path, hung, At(step3=interrupt))
    assert archived(next(tmp_path.rglob("attn_monitor"))) == [0, 1, 2]
    assert "ends with step 2" in caplog.text
    assert "logging pictures to Mine: steps 0, 1, 2" in fit.told[-1]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint")
def test_an_interrupted_snapshot_was_not_taken(tmp_path: Path) -> None:
    """A checkpoint saved after it does not skip it when the run is resumed."""

    class Saves(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    class Interrupted(Distillation):
        def on_train_batch_end(self, *_: Any) -> None:
            super().on_train_batch_end()
            if self.global_step == 3:
                self.student_backbone.blocks[1].register_forward_pre_hook(self.stop)

        def stop(self, module: torch.nn.Module, args: Any) -> None:
            if not module.training:
                raise KeyboardInterrupt

    first = AttentionMapCallback(num_images=2, every_n_train_steps=1)
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    with suppress(SystemExit):
        trainer(tmp_path, Saves(), first, logger=logger, max_steps=6).fit(Interrupted(), loader())
    assert archived(tmp_path / RUN / "attn_monitor") == [0, 1, 2]
    assert first.kept.schedule.last_step == 2
    assert not monitors_threads()
    again = AttentionMapCallback(num_images=2, every_n_train_steps=1)
    trainer(tmp_path, again, max_steps=6).fit(Distillation(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert archived(tmp_path / RUN / "attn_monitor") == [*range(7)]
