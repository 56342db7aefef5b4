"""When snapshots are due, from the step alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from attn_monitor import Watch, load_snapshots
from attn_monitor.train import reports
from attn_monitor.train.schedule import Schedule
from tests.support.helpers import tiny_vit


def taken(schedule: Schedule, steps: range) -> list[int]:
    """The steps at which a run that passes through these takes a snapshot."""
    found = []
    for step in steps:
        if schedule.due(step):
            schedule.taken(step)
            found.append(step)
    return found


def test_every_n_steps_counts_crossings_not_remainders() -> None:
    """With two optimizers the step counter takes every other number and never meets an odd multiple."""
    assert taken(Schedule(every_n_train_steps=3), range(0, 14)) == [0, 3, 6, 9, 12]
    assert taken(Schedule(every_n_train_steps=3), range(0, 14, 2)) == [0, 4, 6, 10, 12]
    assert taken(Schedule(every_n_train_steps=5), range(0, 24, 4)) == [0, 8, 12, 16, 20]


def test_about_fifty_over_a_run() -> None:
    schedule = Schedule()
    schedule.start(10_000)
    assert taken(schedule, range(10_001)) == list(range(0, 10_001, 200))


def test_endless_runs_are_looked_at_ever_less_often() -> None:
    schedule = Schedule()
    schedule.start(math.inf)
    steps = taken(schedule, range(1_000_000))
    assert steps[:3] == [0, 50, 100]
    assert len(steps) < 110


def test_by_epoch() -> None:
    schedule = Schedule(every_n_epochs=2)
    assert taken(schedule, range(50)) == [0]  # only the one before the first step
    assert [epoch for epoch in range(6) if schedule.due_at_epoch_end(epoch, step=10 * epoch + 10)] == [1, 3, 5]


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(reports.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize(
    ("snapshot", "expected"), [(0.001, [0, 1, 2, 4, 8, 16, 32]), (0.19, [0, 4, 8, 16, 32]), (3.0, [0])]
)
def test_short_runs_of_unknown_length(monkeypatch: pytest.MonkeyPatch, snapshot: float, expected: list[int]) -> None:
    """Forty steps of a second: those that take at most a twentieth of the time, the first apart."""
    clock, schedule, taken = Clock(monkeypatch), Schedule(), list[int]()
    schedule.start(math.inf)
    cost = reports.Cost()
    for step in range(41):
        if schedule.due(step) or (schedule.due_early(step) and cost.allows_another()):
            with cost.of_a_snapshot():
                clock.now += snapshot
                cost.snapshots += 1
            schedule.taken(step)
            taken.append(step)
        clock.now += 1.0
    assert taken == expected
    assert (len(taken) - 1) * snapshot <= 0.05 * 41


def test_nothing_is_taken_early_where_the_length_or_the_distance_is_known() -> None:
    for schedule, total in ((Schedule(10), math.inf), (Schedule(None, 1), math.inf), (Schedule(), 500.0)):
        schedule.start(total)
        schedule.taken(0)
        assert not any(map(schedule.due_early, range(60)))


def test_a_short_loop_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports.Cost, "allows_another", lambda _: True)
    watch = Watch(tiny_vit(), torch.randn(1, 3, 32, 32), folder=tmp_path)
    for step in range(40):
        watch.step(step)
    watch.close(40)
    assert [s.step for s in load_snapshots(tmp_path / "attn_monitor")] == [0, 1, 2, 4, 8, 16, 32, 40]


@pytest.mark.parametrize(
    ("arguments", "total", "taken", "due"),
    [
        ({"every_n_train_steps": 10}, 25, [0], 10),
        ({"every_n_train_steps": 10}, 25, [0, 13], 20),  # with several optimizers the step counter skips numbers
        ({"every_n_train_steps": 10}, 25, [0, 10, 20], 25),  # the last one is at the end
        ({}, 100, [0, 2], 4),
        ({}, math.inf, [0], None),  # there may be an early one
        ({}, math.inf, [0, 50], 100),
        ({}, math.inf, [0, 50, 1000], 1100),
        ({"every_n_epochs": 1}, 60, [0], None),
        ({"every_n_epochs": 1}, 60, [0, 20], 40),
        ({"every_n_train_steps": 10}, 25, [], None),
    ],
)
def test_the_next_snapshot_is_known_before_it(
    arguments: dict[str, int], total: float, taken: list[int], due: int | None
) -> None:
    schedule = Schedule(**arguments)
    schedule.start(total)
    for step in taken:
        schedule.taken(step)
    assert schedule.next_due() == due
