"""The queue of a destination: in order, in bounds, and left behind where it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from attn_monitor.background import job_queue
from attn_monitor.background.failures import Failures
from attn_monitor.background.job_queue import Job, JobQueue
from attn_monitor.background.wait_budget import WaitBudget

MEGABYTE = 2**20


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("attn_monitor")]


def queue(failures: Failures | None = None, seconds: float = 20, **settings: bool) -> JobQueue:
    return JobQueue("place", failures or Failures(), WaitBudget(seconds), **settings)


def told_by(failures: Failures) -> list[str]:
    told: list[str] = []
    failures.report(told.append)
    return told


def numbered(done: list[int], step: int) -> Callable[[], None]:
    return lambda: done.append(step)


class Held:
    """A job that ends when it is released."""

    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        self.release.wait(60)


def test_jobs_are_done_in_order_on_another_thread() -> None:
    box, done, names = queue(), [], set()
    for step in range(3):
        box.put(Job("part", step, numbered(done, step)))
        box.put(Job("part", step, lambda: names.add(threading.current_thread().name), retry=False))
    assert box.drain(WaitBudget())
    assert (done, names, box.last_step) == ([0, 1, 2], {"attn_monitor place"}, 2)
    for _ in range(2):
        box.close()
        assert not threads()
    box.put(Job("part", 3, numbered(done, 3)))  # opens again
    box.close()
    assert done == [0, 1, 2, 3]


def test_putting_never_waits_and_drops_the_oldest_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a destination that hangs, all metrics are kept and the latest pictures."""
    monkeypatch.setattr(job_queue, "WAITING", 2)
    failures, release, done = Failures(), threading.Event(), []
    box = queue(failures)
    box.put(Job("metrics", 0, lambda: release.wait(60)))
    started = time.monotonic()
    for step in range(1, 30):
        box.put(Job("pictures", step, numbered(done, -step), retry=False))
        box.put(Job("metrics", step, numbered(done, step), size=200))
    assert time.monotonic() - started < 2
    release.set()
    assert box.drain(WaitBudget(20))
    assert [step for step in done if step > 0] == list(range(1, 30))
    assert [-step for step in done if step < 0] == [28, 29]
    assert told_by(failures) == [
        "pictures failed, training goes on. TimeoutError: place is too slow",
        "pictures works again; missing: steps 1, 2, 3, 4, 5, 6, 7, 8, …, 26, 27 (27 in all)",
    ]
    box.close()


def test_metrics_do_not_wait_for_pictures() -> None:
    """Where the end of a run has little time, they are what is written."""
    held, done = Held(), []
    box = queue()
    box.put(Job("pictures", 0, held, retry=False))
    held.begun.wait()
    for step in (1, 2):
        box.put(Job("pictures", step, numbered(done, -step), retry=False))
        box.put(Job("metrics", step, numbered(done, step)))
    held.release.set()
    box.close()
    assert done == [1, 2, -1, -2]


def test_memory_is_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, held, done = Failures(), Held(), []
    box = queue(failures)
    box.put(Job("metrics", 0, held, size=10 * MEGABYTE))
    held.begun.wait()
    for step in range(1, 10):
        box.put(Job("metrics", step, numbered(done, step), size=10 * MEGABYTE))
    held.release.set()
    box.close()
    assert done == [5, 6, 7, 8, 9]  # and the one that was running: 60 MB
    assert 60 * MEGABYTE <= job_queue.KEPT_BYTES < 70 * MEGABYTE
    assert "missing: steps 1, 2, 3, 4" in told_by(failures)[1]


class WordlessError(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise KeyError("another mistake")


@pytest.mark.parametrize("error", [ConnectionError("x"), SystemExit(3), KeyboardInterrupt(), WordlessError()])
def test_whatever_a_job_raises_the_thread_goes_on(error: BaseException) -> None:
    failures, done = Failures(), []

    def fail() -> None:
        done.append("tried")
        if len(done) == 1:
            raise error

    box = queue(failures)
    box.put(Job("part", 0, fail))
    box.put(Job("part", 1, lambda: done.append("next")))
    assert box.drain(WaitBudget(20))
    assert done == ["tried", "tried", "next"]
    first, second = told_by(failures)
    assert f"part failed, training goes on. {type(error).__name__}" in first
    assert second == "part works again; nothing is missing"
    box.close()


def test_what_fails_for_ever_is_given_up_in_the_end() -> None:
    """A row that a logger never takes must not keep the others back; nor the end of the run."""
    failures, done = Failures(), []
    box = queue(failures)
    box.put(Job("metrics", 0, lambda: 1 / 0))
    for step in (1, 2):
        box.put(Job("metrics", step, numbered(done, step)))
    started = time.monotonic()
    box.close()
    assert done == [1, 2]
    assert time.monotonic() - started < 10
    assert "missing: step 0" in told_by(failures)[1]


@pytest.mark.parametrize("persistent", [False, True])
def test_tries_are_bounded_where_it_may_be_the_jobs_own_fault(
    persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attn_monitor.background.failures.LONGEST_PAUSE", 0.001)
    box, tries, done = queue(persistent=persistent), [], []

    def full() -> None:
        tries.append(1)
        raise OSError(28, "No space left on device")

    box.put(Job("archive", 0, full))
    box.put(Job("archive", 1, numbered(done, 1)))
    deadline = time.monotonic() + 20
    while len(tries) < (job_queue.TRIES * 3 if persistent else job_queue.TRIES) and time.monotonic() < deadline:
        time.sleep(0.01)
    box.close()
    assert done == [1]
    assert (len(tries) > job_queue.TRIES) == persistent


def test_closing_never_waits_longer_than_the_budget_that_is_left() -> None:
    failures, release = Failures(), threading.Event()
    budget = WaitBudget(0.3)
    boxes = [JobQueue(name, failures, budget) for name in ("a", "b", "c")]
    for box in boxes:
        for step in range(3):
            box.put(Job(f"metrics to {box.name}", step, lambda: release.wait(60)))
    started = time.monotonic()
    for box in boxes:
        box.close()
    assert time.monotonic() - started < 10
    assert budget.left == 0
    failures.sum_up()
    told = told_by(failures)
    assert "no answer from a" in told[0]
    assert told[-1].splitlines() == [
        "the run has ended, and this was not done:",
        *(f"  metrics to {name}: steps 0, 1, 2" for name in "abc"),
    ]
    assert len(threads()) == 3
    release.set()
    for thread in threads():  # left behind, and ended by itself
        thread.join(10)
    assert not threads()


def test_one_that_does_not_answer_is_told_of_while_the_run_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "UNANSWERED", 0.05)
    failures, release = Failures(), threading.Event()
    box = queue(failures)
    for step in range(3):
        box.put(Job("metrics", step, lambda: release.wait(60)))
        time.sleep(0.1)
    assert told_by(failures) == ["metrics failed, training goes on. TimeoutError: no answer for 0 s"]
    release.set()
    box.close()
    assert told_by(failures) == ["metrics works again; nothing is missing"]
