"""When snapshots are due, from the step alone."""

from __future__ import annotations

import math

from attn_monitor.train.schedule import Schedule


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
