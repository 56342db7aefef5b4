"""When snapshots are due, from the step alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attn_monitor import AttentionMapCallback, Watch, load_snapshots
from attn_monitor.background.failures import Failures
from attn_monitor.distributed import RankZero
from attn_monitor.train import cost
from attn_monitor.train.cost import Cost
from attn_monitor.train.run import Run
from attn_monitor.train.schedule import Schedule
from tests.support.helpers import tiny_vit
from tests.support.runs import noise_probe


def taken(schedule: Schedule, steps: range) -> list[int]:
    """The steps at which a run that passes through these takes a snapshot."""
    found = []
    for step in steps:
        if schedule.due(step):
            schedule.set_last_step(step)
            found.append(step)
    return found


def test_every_n_steps_counts_crossings_not_remainders() -> None:
    """With two optimizers the step counter takes every other number and never meets an odd multiple."""
    assert taken(Schedule(every_n_train_steps=3), range(0, 14)) == [0, 3, 6, 9, 12]
    assert taken(Schedule(every_n_train_steps=3), range(0, 14, 2)) == [0, 4, 6, 10, 12]
    assert taken(Schedule(every_n_train_steps=5), range(0, 24, 4)) == [0, 8, 12, 16, 20]


@pytest.mark.parametrize(
    ("total", "distance", "count"),
    [(10_000, 200, 51), (1_000, 20, 51), (300, 6, 51), (120, 6, 21), (60, 6, 11), (30, 3, 11), (12, 1, 13), (2, 1, 3)],
)
def test_fifty_over_a_run_and_ten_over_a_short_one(total: int, distance: int, count: int) -> None:
    schedule = Schedule()
    schedule.start(total)
    steps = taken(schedule, range(total + 1))
    assert steps == list(range(0, total + 1, distance))
    assert len(steps) == schedule.count() == count


def test_endless_runs_are_looked_at_ever_less_often() -> None:
    schedule = Schedule()
    schedule.start(math.inf)
    steps = taken(schedule, range(1_000_000))
    assert steps[:10] == [0, 1, 2, 4, 8, 16, 32, 64, 114, 164]
    assert len(steps) < 120


def test_by_epoch() -> None:
    schedule = Schedule(every_n_epochs=2)
    assert taken(schedule, range(50)) == [0]  # only the one before the first step
    assert [epoch for epoch in range(6) if schedule.due_at_epoch_end(epoch, step=10 * epoch + 10)] == [1, 3, 5]
    assert schedule.count() is None
    schedule.start(50, epochs=5)
    assert schedule.count() == 4  # after 0, 2, 4 and 5


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share: float = 0.05, free: float = 0.0) -> None:
        self.now = 100.0
        monkeypatch.setattr(cost.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(cost, "SHARE", share)
        monkeypatch.setattr(cost, "FREE", free)


def run_of(clock: Clock, steps: int, *, snapshot: float, seconds: float = 1.0, schedule: Schedule) -> tuple[Cost, int]:
    """Train so many steps of so many seconds with snapshots that take ``snapshot`` each; the seconds of those between.

    The decision is that of `Run`, on a run without models.
    """
    run = object.__new__(Run)
    run.kept, run.cost, run.rank_zero = SimpleNamespace(schedule=schedule), Cost(), RankZero()  # type: ignore[assignment]
    run.errors = SimpleNamespace(active=True)  # type: ignore[assignment]
    for step in range(steps):
        if run.due(step):
            with run.cost.of_a_snapshot(step):
                clock.now += snapshot
                run.cost.snapshots += 1
            schedule.set_last_step(step)
        clock.now += seconds
    return run.cost, run.cost.snapshots - 1


@pytest.mark.parametrize("total", [60, 660, 10_000, math.inf])
@pytest.mark.parametrize("snapshot", [0.001, 0.05, 0.2, 1.0, 7.0, 100.0])
def test_snapshots_take_a_twentieth_of_the_loop_at_most(
    monkeypatch: pytest.MonkeyPatch, total: float, snapshot: float
) -> None:
    """Those after the first, whatever they cost; of what is wanted and fits, half is taken at least."""
    clock, schedule, steps = Clock(monkeypatch), Schedule(), int(min(total, 2_000))
    schedule.start(total)
    cost, after_first = run_of(clock, steps, snapshot=snapshot, schedule=schedule)
    assert after_first * snapshot <= 0.05 * (steps + after_first * snapshot)
    free = Schedule()
    free.start(total)
    wanted, fitting = len(taken(free, range(steps))) - 1, int(0.05 * steps / snapshot)
    assert after_first >= min(wanted, fitting) // 2 - 1
    assert cost.postponed == 0 or after_first < wanted


def test_sixty_steps_take_about_ten_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule()
    schedule.start(60)
    assert run_of(Clock(monkeypatch), 60, snapshot=0.25, schedule=schedule)[1] + 2 == 11  # the last one is at the end


def test_a_run_of_a_second_has_its_snapshots_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, taken_after_first in ((0.0, 0), (1.0, 9)):
        schedule = Schedule()
        schedule.start(60)
        clock = Clock(monkeypatch, free=free)
        assert run_of(clock, 60, snapshot=0.1, seconds=0.02, schedule=schedule)[1] == taken_after_first


def test_steps_that_get_slower_or_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distance follows what steps take now: it is looked at again at twice the distance at the latest."""
    clock, schedule = Clock(monkeypatch), Schedule()
    schedule.start(10_000)
    cost, first = run_of(clock, 1_000, snapshot=20.0, seconds=0.1, schedule=schedule)
    assert (first, cost.postponed > 0) == (0, True)
    assert schedule.not_before <= 2_000
    assert schedule.next_due() == schedule.not_before
    assert schedule.not_before % 200 == 0


def test_a_dear_snapshot_is_put_off_to_the_step_at_which_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a second each, two fit into 40 s after the first; with steps of 2 s, one of them taken, that is at step 20."""
    clock, spent = Clock(monkeypatch), Cost()
    for step in (0, 10):
        with spent.of_a_snapshot(step):
            clock.now += 1.0
            spent.snapshots += 1
        clock.now += 20.0 if step == 0 else 16.0
    assert spent.next_check_step(18, last=10) == 20
    clock.now += 4.0
    assert spent.next_check_step(20, last=10) is None


def test_what_the_user_asks_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(every_n_train_steps=5)
    schedule.start(20)
    assert run_of(Clock(monkeypatch), 20, snapshot=100.0, schedule=schedule)[1] + 1 == 4


def test_a_snapshot_that_is_put_off_stays_so_in_a_resumed_run() -> None:
    kept, again = (AttentionMapCallback().kept for _ in range(2))
    kept.watch(noise_probe())
    kept.schedule.start(660)
    kept.schedule.set_last_step(0)
    kept.schedule.postpone(40)
    again.load_state_dict(kept.state_dict(Failures()))
    again.schedule.start(660)
    for schedule in (kept.schedule, again.schedule):
        assert (schedule.next_due(), taken(schedule, range(1, 100))) == (52, [52, 65, 78, 91])


def test_a_short_loop_of_ones_own(tmp_path: Path) -> None:
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
        ({}, 500, [0, 10], 20),
        ({}, math.inf, [0], 1),
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
        schedule.set_last_step(step)
    assert schedule.next_due() == due
