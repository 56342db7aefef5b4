"""The verdict on made-up runs: each finding by itself, and none where a run is well, short or has recovered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from attn_monitor.measure.run_history import RunHistory
from attn_monitor.measure.verdict import FROM_START, INTERVALS, judge
from attn_monitor.measurements import TRAINING, MetricKey, Metrics, Verdict

K = 4096
WELL: dict[str, Sequence[float]] = {
    "training/loss": [8.0, 6.5, 5.6, 5.0, 4.6, 4.4, 4.5, 4.6, 4.3, 4.2],
    "teacher/mean_cosine": [0.97, 0.8, 0.6, 0.5, 0.45, 0.4, 0.4, 0.42, 0.4, 0.4],
    "teacher/effective_rank": [20, 40, 60, 80, 90, 95, 90, 92, 94, 95],
    "teacher/feature_samples": [4096.0] * 10,
    "student/prototypes": [float(K)] * 10,
    "student/assignment_entropy_each": [0.99, 0.9, 0.8, 0.7, 0.6, 0.55, 0.55, 0.5, 0.5, 0.5],
    "student/assignment_entropy_mean": [0.99, 0.95, 0.93, 0.92, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9],
    "teacher/11/entropy": [1.0, 0.98, 0.93, 0.88, 0.84, 0.8, 0.78, 0.78, 0.77, 0.77],
    "teacher/11/dense_separability": [0.5, 0.6, 0.8, 0.9, 0.95, 1.0, 1.0, 0.98, 0.97, 0.96],
}

WITH_TEACHER = ["training/loss", "teacher/mean_cosine"]


def verdict(changes: dict[str, Any] | None = None, *, only: Sequence[str] | None = None) -> Verdict:
    """The verdict on a run of ten snapshots, 100 steps apart; ``changes`` replace the ends of its curves."""
    history = RunHistory()
    curves = {tag: list(line) for tag, line in WELL.items() if only is None or tag in only}
    for tag, end in (changes or {}).items():
        curves[tag] = [*curves.get(tag, [0.0] * 10)[: 10 - len(end)], *end]
    for index in range(10):
        values = Metrics()
        for tag, line in curves.items():
            role, *layer, metric = tag.split("/")
            values[MetricKey(role, int(layer[0]) if layer else None, metric)] = line[index]
        history.add(100 * index, values)
    return judge(history)


def test_a_run_that_goes_well() -> None:
    assert verdict() == Verdict("healthy")
    assert verdict(only=["training/loss"]) == Verdict("healthy")
    assert str(verdict()) == "healthy"


def test_no_verdict_before_there_is_evidence() -> None:
    assert judge(RunHistory()) == Verdict("no verdict yet")
    history = RunHistory()
    for step in range(3):
        history.add(step, {MetricKey(TRAINING, None, "loss"): 5.0})
    assert judge(history).state == "no verdict yet"
    assert verdict(only=["teacher/11/entropy"]).state == "no verdict yet"  # attention alone makes nothing healthy


@pytest.mark.parametrize("k", [4096, 65536])
def test_a_loss_that_stands_at_ln_k_means_uniform_answers(k: int) -> None:
    """Where no head was found, K is told by the loss: 8.3178 = ln 4096, 11.0904 = ln 65536."""
    at = round(math.log(k), 4)
    assert at in (8.3178, 11.0904)
    found = verdict({"training/loss": [at, at + 0.001, at - 0.002]}, only=WITH_TEACHER)
    assert (found.state, found.since) == ("complete collapse", 700)
    assert f"ln {k:,}, that of a uniform answer" in str(found)
    passing = verdict({"training/loss": [at, at * 1.02, at]}, only=WITH_TEACHER)
    assert passing.state != "complete collapse"
    other = verdict({"training/loss": [at, at, at]}, only=["training/loss", "backbone/mean_cosine"])
    assert other == Verdict("healthy"), "a loss of another kind may have any value"


@pytest.mark.parametrize(
    ("state", "since", "words", "changes"),
    [
        ("complete collapse", 600, "uniform answer", {"student/assignment_entropy_each": [0.992, 0.995, 0.999, 1.0]}),
        ("complete collapse", 700, "the same answer", {"student/assignment_entropy_mean": [0.505, 0.505, 0.505]}),
        ("complete collapse", 700, "cosine of 0.990, up from 0.400", {"teacher/mean_cosine": [0.98, 0.985, 0.99]}),
        ("diverging", 900, "the loss is NaN", {"training/loss": [math.nan]}),
        ("diverging", 800, "global features is NaN", {"teacher/mean_cosine": [math.nan, math.nan]}),
        ("diverging", 700, "above 8.32 of the start", {"training/loss": [14, 15, 16]}),
        ("diverging", 500, "swings between 0.5 and 8", {"training/loss": [0.5, 6, 1, 8, 2]}),
        ("attention collapsed", 700, "on a few patches", {"teacher/11/entropy": [0.15, 0.12, 0.1]}),
        ("attention collapsed", 0, "on a few patches", {"teacher/11/entropy": [0.1] * 10}),
        ("prototype collapse", 700, "60% of the prototypes", {"student/prototypes_alike": [0.5, 0.5, 0.6]}),
        ("dimensional collapse", 700, "is 12, and was 95", {"teacher/effective_rank": [14, 13, 12]}),
    ],
)
def test_each_finding(state: str, since: int, words: str, changes: dict[str, Any]) -> None:
    found = verdict(changes)
    assert (found.state, found.since) == (state, since), str(found)
    assert words in str(found)
    assert found.is_bad
    assert found.advice
    flag = found.flag(900)
    assert (flag.kind, flag.role, flag.layer) == (state.replace(" ", "_"), TRAINING, None)
    short = {tag: [*end[:-3], *WELL.get(tag, [0.0] * 10)[-3:]] for tag, end in changes.items()}
    if "swings" not in words:  # which are looked for in longer windows
        assert not verdict(short).is_bad, "a run that has recovered is healthy"


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("was 1 at step 500", {"teacher/11/dense_separability": [0.8, 0.7, 0.6, 0.5]}),
        ("uniform again since step 700", {"teacher/11/entropy": [0.996, 0.998, 0.999]}),
    ],
)
def test_rules_that_are_not_calibrated_only_note(words: str, changes: dict[str, Any]) -> None:
    found = verdict(changes)
    assert (found.state, found.since, found.is_bad) == ("healthy", None, False)
    assert words in str(found)
    assert found.advice
    assert verdict({**changes, "training/loss": [math.nan]}).state == "diverging", "what is certain comes first"


def test_a_lower_rank_without_a_teacher_is_only_noted() -> None:
    """A classifier of two classes needs one direction."""
    rank = [20, 40, 30, 10, 5, 3, 2, 1.2, 1.1, 1.1]
    history = RunHistory()
    for index, value in enumerate(rank):
        history.add(
            index, {MetricKey("backbone", None, "effective_rank"): value, MetricKey(TRAINING, None, "loss"): 1.0}
        )
    found = judge(history)
    assert found.state == "healthy"
    assert "is 1.1, and was 40, low since step 3" in str(found)


def test_what_every_run_begins_with_needs_longer() -> None:
    """Answers are uniform in the first snapshots of any run; features that are alike from the start may be well."""
    assert verdict({"teacher/mean_cosine": [0.99] * 10}) == Verdict("healthy")
    assert verdict({"teacher/mean_cosine": [0.96, *[0.99] * 9]}) == Verdict("healthy")
    for tag in ("student/assignment_entropy_each",):
        for first in (FROM_START - 1, FROM_START):
            history = RunHistory()
            for index in range(first):
                role, metric = tag.split("/")
                history.add(index, {MetricKey(role, None, metric): 0.99, MetricKey(TRAINING, None, "loss"): 5.0})
            assert judge(history).is_bad == (first == FROM_START)


def test_dense_features_must_have_formed_before_they_decay() -> None:
    """Random weights separate patches well; in healthy runs that falls while features form."""
    falling = [0.61, 0.61, 0.58, 0.54, 0.51, 0.5, 0.47, 0.45, 0.44, 0.43]
    assert verdict({"teacher/11/dense_separability": falling}) == Verdict("healthy")


def test_ranks_of_few_samples_are_left_out() -> None:
    """The last snapshot may come after few steps."""
    few = {"teacher/effective_rank": [12, 12, 12], "teacher/feature_samples": [256, 256, 256]}
    assert verdict(few) == Verdict("healthy")


def test_a_history_goes_through_checkpoints_and_back() -> None:
    history = RunHistory()
    for step in range(10):
        history.add(step, {MetricKey(TRAINING, None, "loss"): 5.0 - step, MetricKey("teacher", 3, "entropy", 0): 1.0})
    again = RunHistory.from_state_dict(history.state_dict())
    assert again == history
    assert list(again.values) == [(TRAINING, "loss")]  # of heads nothing
    again.add(4, {MetricKey(TRAINING, None, "loss"): 9.0})  # resumed from step 3
    assert again.of("loss") == [(0, 5.0), (1, 4.0), (2, 3.0), (3, 2.0), (4, 9.0)]
    again.complete(2, {MetricKey("teacher", 3, "dense_separability"): 0.5})
    assert again.of("dense_separability", "teacher") == [(2, 0.5)]
    assert again.of("loss")[-1] == (4, 9.0)
    assert INTERVALS < 10
