"""The background writer and the account of failures."""

from __future__ import annotations

import threading
import time

import pytest

from attn_monitor import background
from attn_monitor.background import BackgroundWriter, Failures


def test_jobs_run_in_order_on_another_thread() -> None:
    writer, done = BackgroundWriter(), []
    for index in range(3):
        assert writer.submit(lambda index=index: done.append((index, threading.current_thread().name)))
    assert writer.drain()
    assert [i for i, _ in done] == [0, 1, 2]
    assert {name for _, name in done} == {"attn_monitor-writer"}
    writer.close()
    writer.close()
    assert not [t for t in threading.enumerate() if t.name == "attn_monitor-writer"]


def test_slow_sink_holds_back_and_is_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded: memory cannot grow, and training waits no longer than PATIENCE."""
    monkeypatch.setattr(background, "PATIENCE", 0.05)
    writer, release = BackgroundWriter(size=1), threading.Event()
    accepted = [writer.submit(lambda: release.wait(10) and None) for _ in range(4)]
    assert accepted[0]
    assert accepted[-1] is False
    started = time.monotonic()
    assert not writer.drain(0.05)
    assert time.monotonic() - started < 5
    release.set()
    assert writer.drain(10)
    writer.close()


def fail(error: Exception) -> None:
    raise error


def test_failures_are_told_once_and_switch_off_only_their_part() -> None:
    failures, told = Failures("look here"), []
    for _ in range(5):
        assert not failures.attempt("archive", lambda: fail(OSError("disk full")))
        assert failures.attempt("drawing", lambda: None)
    failures.report(told.append)
    assert [t.split(".")[0] for t in told] == [
        "archive failed, training goes on",
        "archive is switched off after 3 failures in a row; look here",
    ]
    assert all("OSError: disk full" in t for t in told)
    assert failures.is_off("archive")
    assert not failures.is_off("drawing")


def test_success_or_another_kind_starts_the_count_anew() -> None:
    failures, told = Failures(), []
    for error in (OSError("a"), OSError("b"), ValueError("c"), OSError("d"), OSError("e")):
        failures.attempt("archive", lambda error=error: fail(error))
    assert not failures.is_off("archive")
    failures.attempt("archive", lambda: None)
    failures.report(told.append)
    assert len(told) == 3


def test_raise_instead_of_warning() -> None:
    failures = Failures()
    failures.attempt("archive", lambda: fail(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        failures.report(lambda text: None, reraise=True)


def test_errors_can_be_let_through() -> None:
    with pytest.raises(KeyError):
        Failures().attempt("snapshot", lambda: fail(KeyError("x")), let=KeyError)
