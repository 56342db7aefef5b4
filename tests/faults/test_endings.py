"""How processes end: with the right exit code, whatever is being drawn or hangs then; and threads not to be had."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from attn_monitor import AttentionMapCallback, load_snapshots, workers
from attn_monitor.background import wait_budget
from attn_monitor.background.failures import Failures
from attn_monitor.background.job_queue import Job, JobQueue
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.draw import panels
from attn_monitor.workers import Worker, safe_point
from tests.support import forked
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, trainer
from tests.support.processes import ROOT

# Each ending is that of a forked process: Python finalises as in any other, and libraries are imported once.
FORKS = """
    import os, sys, time, warnings
    import torch
    IMPORTS

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    child = False
    for _ in range(int(sys.argv[1])):
        started = time.monotonic()
        if (process := os.fork()) == 0:
            child = True
            break
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print("code", code, round(time.monotonic() - started, 1), flush=True)
    if child:
        WORK
"""


QUEUE = """
    from attn_monitor import workers
    from attn_monitor.background.failures import Failures
    from attn_monitor.background.job_queue import Job, JobQueue
    from attn_monitor.background.wait_budget import WaitBudget
    from attn_monitor.workers import safe_point
"""
LIGHTNING = """
    import signal, tempfile
    from pathlib import Path
    import lightning.pytorch as pl
    from torch.utils.tensorboard import SummaryWriter
    from attn_monitor import AttentionMapCallback
    from attn_monitor.background import wait_budget
    from tests.support.helpers import Distillation, loader, trainer
"""


def endings(work: str, count: int, imports: str = QUEUE) -> list[tuple[int, float]]:
    """Exit code, negative for a signal, and seconds of so many processes that each did some work."""
    script = textwrap.dedent(FORKS).replace("IMPORTS", textwrap.dedent(imports))
    script = script.replace("    WORK", textwrap.indent(textwrap.dedent(work), "    "))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script, str(count)]
    ran = forked.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert ran.returncode in (0, 1), ran.stderr[-3000:]
    told = [line.split() for line in ran.stdout.splitlines() if line.startswith("code")]
    assert len(told) == count, ran.stderr[-3000:]
    return [(int(code), float(seconds)) for _, code, seconds in told]


def test_python_ends_while_pictures_are_drawn() -> None:
    """Threads that Python ends within PyTorch abort the process; these have left it before."""
    work = """
        def draw():
            while True:
                safe_point()
                for _ in range(50):
                    torch.randn(64, 64).softmax(-1).sort()

        for number in range(3):
            JobQueue(f"place {number}", Failures(), WaitBudget()).put(Job("pictures", 0, draw, retry=False))
        time.sleep(0.2)
        sys.exit(3)
    """
    assert {code for code, _ in endings(work, 8)} == {3}


def test_python_ends_although_a_logger_never_answers() -> None:
    work = """
        workers.AT_EXIT = 0.5
        for number in range(3):
            JobQueue(f"place {number}", Failures(), WaitBudget()).put(Job("metrics", 0, lambda: time.sleep(60)))
        time.sleep(0.2)
        sys.exit(4)
    """
    ((code, seconds),) = endings(work, 1)
    assert code == 4
    assert seconds < 20
    assert workers.AT_EXIT <= 5


def test_a_thread_without_work_does_not_hold_up_the_end() -> None:
    work = """
        workers.AT_EXIT = 60
        box = JobQueue("place", Failures(), WaitBudget())
        box.put(Job("metrics", 0, lambda: None))
        box.drain(WaitBudget())
        sys.exit(5)
    """
    ((code, seconds),) = endings(work, 1)
    assert code == 5
    assert seconds < 30


RUN = """
    class At(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3 and SIGNAL is not None:
                os.kill(os.getpid(), SIGNAL)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    wait_budget.RUN_SECONDS, wait_budget.EXCEPTION_SECONDS = 1.0, 0.5
    watch = AttentionMapCallback(num_images=16, every_n_train_steps=1)
    module = Distillation(img_size=224, patch_size=16, num_heads=8)
    running = trainer(Path(tempfile.mkdtemp()), watch, At(), max_steps=4 if SIGNAL is None else 500)
    running.fit(module, loader(16, 2, size=224))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 1), ("SIGTERM", 0), ("None", 0)])
def test_a_run_that_is_interrupted_or_ends_with_work_left(name: str, code: int) -> None:
    """The codes are those of the same run without the callback."""
    found = endings(RUN.replace("SIGNAL", name if name == "None" else f"signal.{name}"), 3, LIGHTNING)
    assert {found_code for found_code, _ in found} == {code}


# Work that is given up


def test_a_report_that_takes_too_long_is_given_up_between_two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, files, started = Failures(), [], threading.Event()

    def report() -> None:
        started.set()
        for number in range(10_000):
            safe_point()
            files.append(number)
            time.sleep(0.01)

    box = JobQueue("archive", failures, WaitBudget(0.2))
    box.put(Job("writing the report", None, report, retry=False))
    started.wait(20)
    box.close()
    for thread in threading.enumerate():
        if isinstance(thread, Worker):
            thread.join(20)
    assert 0 < len(files) < 10_000
    told: list[str] = []
    failures.report(told.append)
    assert told == ["writing the report failed, training goes on. TimeoutError: no answer from archive"]


def test_drawing_is_given_up_between_two_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is over after its patience, and no thread goes on drawing for longer than one picture takes."""
    real, drawn = panels.panel, []

    def slow(*args: object, **settings: object) -> object:
        time.sleep(0.3)
        drawn.append(time.monotonic())
        return real(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(panels, "panel", slow)
    monkeypatch.setattr(wait_budget, "RUN_SECONDS", 0.5)
    watch = AttentionMapCallback(num_images=8, every_n_train_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not done is told, see `test_outages`
        trainer(tmp_path, watch, max_steps=2).fit(Distillation(), loader())
    over = time.monotonic()
    for thread in threading.enumerate():
        if isinstance(thread, Worker):
            thread.join(20)
    assert time.monotonic() - over < 5
    assert len(drawn) < 3 * 8


# Threads that are not to be had


class NoThreads:
    """`Worker.start` as of a process that has as many threads as it may, for a number of times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left, self._start = times, Worker.start
        monkeypatch.setattr(Worker, "start", lambda worker: self.start(worker))

    def start(self, worker: Worker) -> None:
        if self.left:
            self.left -= 1
            raise RuntimeError("can't start new thread")
        self._start(worker)


def test_a_thread_that_cannot_be_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    NoThreads(monkeypatch, 2)
    failures, done, told = Failures(), [], []
    box = JobQueue("archive", failures, WaitBudget(20), persistent=True)
    for step in range(3):
        box.put(Job("writing the archive", step, lambda step=step: done.append(step)))  # type: ignore[misc]
    box.close()
    assert done == [0, 1, 2]
    failures.report(told.append)
    assert told == [
        "writing the archive failed, training goes on. RuntimeError: can't start new thread",
        "writing the archive works again; nothing is missing",
    ]


def test_a_thread_that_can_never_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end does not wait for it, and says what is missing and why."""
    NoThreads(monkeypatch, 1000)
    failures, told, started = Failures(), [], time.monotonic()
    box = JobQueue("place", failures, WaitBudget(20))
    for step in range(6):
        box.put(Job("metrics", step, lambda: None))
        box.put(Job("pictures", step, lambda: None, retry=False))
    box.close()
    assert time.monotonic() - started < 5
    failures.sum_up()
    failures.report(told.append)
    assert told[0] == "metrics failed, training goes on. RuntimeError: can't start new thread"
    assert not any("TimeoutError: no answer" in text for text in told)
    assert "metrics: steps 0, 1, 2, 3, 4, 5" in told[-1]


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_run_in_which_threads_are_not_to_be_had_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Whichever of its threads that is, the archive and the logger have every step."""
    NoThreads(monkeypatch, times)
    watch = AttentionMapCallback(num_images=2, every_n_train_steps=1)
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told and mended, see above
        trainer(tmp_path, watch, logger=logger, max_steps=4).fit(Distillation(), loader())
    (archive,) = tmp_path.rglob("attn_monitor")
    assert [s.step for s in load_snapshots(archive)] == [0, 1, 2, 3, 4]
    steps = [step for step, _ in Events(tmp_path / "run" / "version_0").scalars("attn/student/layer1/entropy")]
    assert steps == [0, 1, 2, 3, 4]


# What is waited for on the training thread


def test_what_a_disk_returns_or_raises_in_time() -> None:
    assert WaitBudget(20).call(lambda: threading.current_thread().name) == "attn_monitor disk"
    with pytest.raises(FileNotFoundError):
        WaitBudget(20).call(lambda: os.stat("/nowhere/at/all"))


def test_what_comes_too_late_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    release, late = threading.Event(), threading.Event()
    with pytest.raises(TimeoutError, match="not done after 0 s"):
        WaitBudget(0.4).call(lambda: release.wait(20), lambda found: late.set())
    assert not late.is_set()
    release.set()
    assert late.wait(20)
