"""What an exception does to a run depends on its stage: end it, end the watching of it, or become a warning."""

from __future__ import annotations

from typing import NoReturn

import pytest

from attn_monitor.errors import NoAttentionError, ProbeError
from attn_monitor.train.run_errors import RunErrors, Stage


def run(*, strict: bool = False, raises: bool = False, watched: bool = True) -> tuple[RunErrors, list[str]]:
    shown: list[str] = []
    return RunErrors(shown.append, strict=strict, raises=raises, watched=watched), shown


def fail(error: Exception) -> NoReturn:
    raise error


def attempt(errors: RunErrors, error: Exception) -> bool:
    return errors.attempt("a part", lambda: fail(error))


@pytest.mark.parametrize("how", ["strict", "raises"])
def test_before_the_first_step_a_users_error_ends_a_strict_run(how: str) -> None:
    errors, _ = run(strict=how == "strict", raises=how == "raises")
    with pytest.raises(ProbeError):
        attempt(errors, ProbeError("no images"))


def test_before_the_first_step_a_users_error_ends_the_watching_of_others() -> None:
    errors, shown = run()
    assert not attempt(errors, ProbeError("no images."))
    assert shown == ["attention is not watched in this run. no images"]
    assert errors.stage is Stage.UNWATCHED
    errors.begin_step()
    errors.enter(Stage.WATCHING)
    assert not errors.active


@pytest.mark.parametrize("error", [ProbeError("no images"), OSError("full"), RuntimeError("bug")])
def test_later_it_is_a_warning(error: Exception) -> None:
    errors, shown = run(strict=True)
    errors.begin_step()
    assert not attempt(errors, error)
    assert errors.stage is Stage.TRAINING
    assert shown == []
    errors.report()
    assert len(shown) == 1
    assert str(error) in shown[0]


def test_a_report_raises_if_it_is_to() -> None:
    errors, _ = run(raises=True)
    errors.begin_step()
    attempt(errors, OSError("full"))
    with pytest.raises(OSError, match="full"):
        errors.report()


@pytest.mark.parametrize("begun", [False, True])
def test_models_are_searched_twice(begun: bool) -> None:
    errors, shown = run()
    if begun:
        errors.begin_step()
    assert not attempt(errors, NoAttentionError("none"))
    assert errors.active
    assert errors.searches_again()
    errors.begin_step()
    assert not attempt(errors, NoAttentionError("none"))
    assert not errors.searches_again()
    assert (errors.stage, len(shown)) == (Stage.UNWATCHED, 1)


def test_once_watched_a_model_that_is_gone_is_a_failure() -> None:
    errors, shown = run()
    errors.enter(Stage.WATCHING)
    errors.begin_step()
    assert not attempt(errors, NoAttentionError("none"))
    assert (errors.stage, shown) == (Stage.WATCHING, [])
    assert not errors.searches_again()


def test_a_process_that_does_not_watch() -> None:
    errors, _ = run(watched=False)
    errors.begin_step()
    assert (errors.active, errors.stage) == (False, Stage.UNWATCHED)
