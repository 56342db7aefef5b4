"""The account of failures: what is told, how often, and when a part is tried again."""

from __future__ import annotations

import pytest

from attn_monitor.background import failures as account
from attn_monitor.background.failures import Failures, in_words


def fail(error: BaseException) -> None:
    raise error


def told_by(failures: Failures) -> list[str]:
    told: list[str] = []
    failures.report(told.append)
    return told


class Clock:
    """In place of `time`, and moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(account, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_a_failure_and_its_end_are_told_once_each() -> None:
    failures = Failures("look here")
    for step in range(5):
        assert not failures.attempt("archive", lambda: fail(OSError("disk full")))
        failures.lost("archive", step)
        assert failures.attempt("drawing", lambda: None)
    assert told_by(failures) == ["archive failed, training goes on. OSError: disk full (will be retried; look here)"]
    assert failures.attempt("archive", lambda: None)
    assert told_by(failures) == ["archive works again; missing: steps 0, 1, 2, 3, 4"]
    failures.sum_up()
    assert told_by(failures) == []


def test_tried_again_at_growing_distances_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, pauses = Failures(), []
    for _ in range(3000):
        failures.failed("archive", OSError("x"))
        pauses.append(failures.pause("archive"))
    assert pauses[:9] == pytest.approx([0, 1, 2, 4, 8, 16, 32, 64, 120], abs=0.5)
    assert max(pauses) <= account.LONGEST_PAUSE <= 180
    assert failures.pause("drawing") == 0
    failures.worked("archive")
    assert failures.pause("archive") == 0


@pytest.mark.parametrize("recovers", [True, False])
def test_on_and_off_or_of_changing_types_is_not_told_each_time(recovers: bool) -> None:
    """Every other time, and errors of alternating types: a hundred of them are two warnings and one at the end."""
    failures = Failures()
    for step in range(100):
        error = OSError("a") if step % 2 else ValueError("b")
        failures.attempt("metrics", lambda error=error: fail(error))
        failures.lost("metrics", step)
        if recovers:
            failures.attempt("metrics", lambda: None)
    failures.sum_up()
    told = told_by(failures)
    assert len(told) == 2 + recovers
    assert "(99 in all)" in told[-1] if recovers else "(100 in all)" in told[-1]


def test_a_later_outage_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, clock = Failures(), Clock(monkeypatch)
    for _ in range(2):
        failures.attempt("metrics", lambda: fail(OSError("x")))
        failures.attempt("metrics", lambda: None)
        clock.now += account.SILENCE + 1
    assert len(told_by(failures)) == 4


def test_an_outage_that_began_in_silence_is_told_when_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, clock = Failures(), Clock(monkeypatch)
    failures.attempt("metrics", lambda: fail(OSError("first")))
    failures.attempt("metrics", lambda: None)
    failures.attempt("metrics", lambda: fail(OSError("second")))
    assert len(told_by(failures)) == 2
    clock.now += account.SILENCE + 1
    failures.attempt("metrics", lambda: fail(OSError("still")))
    assert told_by(failures) == ["metrics failed, training goes on. OSError: still"]


def test_each_thing_is_new_once() -> None:
    failures = Failures()
    assert [failures.is_new(key) for key in ("a", ("a", 1), "a", ("a", 1))] == [True, True, False, False]


def test_raise_instead_of_warning() -> None:
    failures = Failures()
    failures.attempt("archive", lambda: fail(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        failures.report(lambda text: None, reraise=True)


def test_errors_can_be_let_through() -> None:
    with pytest.raises(KeyError):
        Failures().attempt("snapshot", lambda: fail(KeyError("x")), raising=KeyError)


def test_the_result_of_what_fails_is_none() -> None:
    failures, told = Failures(), list[str]()
    assert failures.result_of("the answer", lambda: 42) == 42
    assert failures.result_of("the answer", lambda: fail(KeyError("x"))) is None
    failures.report(told.append)
    assert told == ["the answer failed, training goes on. KeyError: 'x'"]


def test_steps_in_words() -> None:
    assert in_words([4]) == "step 4"
    assert in_words([4, 3, 3]) == "steps 3, 4"
    assert in_words(range(100)) == "steps 0, 1, 2, 3, 4, 5, 6, 7, …, 98, 99 (100 in all)"
