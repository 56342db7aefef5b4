"""What sampled weights say of an average, on made-up values and against an average computed anew."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_monitor.measure.ema_checks import EmaChecker
from attn_monitor.measure.ema_steps import Moment, OptimizerStep, Sampled, WatchedStep, momentum_of
from attn_monitor.measurements import HealthFlag

N = 96
DTYPES = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
seeds = st.integers(0, 2**16)
momenta = st.floats(0.0, 0.9999)
distances = st.floats(1e-4, 1.0)


def values(seed: int, scale: float = 1.0) -> Tensor:
    """Weights of a third each: matrices, scales that are 1, biases that are 0."""
    noise = torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale
    return noise * 0.02 + torch.cat([noise[:32] * 0, torch.ones(32), torch.zeros(32)])


def averaged(before: Tensor, student: Tensor, momentum: float, how: int) -> Tensor:
    """In the ways that are found in public code."""
    if how == 0:
        return before.clone().mul_(momentum).add_((1 - momentum) * student)
    if how == 1:
        return before.lerp(student, 1 - momentum)
    return before * momentum + student * (1.0 - momentum)


def momentum(before: Tensor, after: Tensor, student: Tensor) -> float | None:
    precision = torch.full((N,), torch.finfo(before.dtype).eps, dtype=torch.float64)
    return momentum_of(before.double(), after.double(), student.double(), precision)


def largest_error(before: Tensor, student: Tensor, precision: float) -> float:
    """Of a fit weighted by precision, if every value is rounded twice and all in the direction that is worst."""
    parts = (student - before).abs() / (precision * (before.abs() + student.abs())).clamp(min=1e-300)
    return 2 * float(parts.sum() / parts.square().sum())


@settings(deadline=None, max_examples=60)
@given(seeds, momenta, distances, st.sampled_from(list(DTYPES)), st.integers(0, 2))
def test_the_momentum_of_an_average_is_found(
    seed: int, m: float, distance: float, dtype: torch.dtype, how: int
) -> None:
    before, student = values(seed).to(dtype), (values(seed) + distance * values(seed + 1)).to(dtype)
    found = momentum(before, averaged(before, student, m, how), student)
    if dtype == torch.float32 and (1 - m) * distance > 1e-3:  # else rounding may hide it
        assert found is not None
    if found is not None:
        assert abs(found - m) <= largest_error(before.double(), student.double(), DTYPES[dtype]) + 1e-6


@settings(deadline=None, max_examples=60)
@given(seeds, distances, st.sampled_from(["elsewhere", "away", "partly", "beyond"]))
def test_other_moves_are_no_average(seed: int, distance: float, what: str) -> None:
    before = values(seed)
    student = before + distance * values(seed + 1)
    after = before + 0.1 * distance * values(seed + 2)
    if what == "away":
        after = before - 0.1 * (student - before)
    if what == "beyond":
        after = before + 1.1 * (student - before)
    if what == "partly":
        after = before + torch.linspace(0.1, 0.2, N) * (student - before)
    assert momentum(before, after, student) is None


@given(seeds)
def test_standing_still_is_no_update(seed: int) -> None:
    before = values(seed)
    assert momentum(before, before, before + values(seed + 1)) is None
    assert momentum(before, before, before) is None


def run(
    steps: int, *, update: str, m: float = 0.9, lr: float = 0.1, scheduled: Any = None, **facts: Any
) -> list[HealthFlag]:
    """A made-up training in which the student moves by noise and its average is updated somewhere."""
    sampled = Sampled(torch.full((N,), 2.0**-23, dtype=torch.float64), (slice(32, 48), slice(48, 64)))
    wiring, found = EmaChecker(sampled, stall_steps=6), list[HealthFlag]()
    student = torch.cat([values(0)[:32], torch.ones(32), torch.zeros(32)])
    teacher = student.clone()
    for step in range(steps):
        moments = [("start", student, teacher)]
        for at in ("forward", "step", "end"):
            if at == "step" and lr and facts.get("student_requires_grad", True):
                student = student + 0.01 * values(step + 1)
            if at in update:
                source = moments[-1][1] if at == "step" else student
                teacher = averaged(teacher, source, m if scheduled is None else scheduled(step), step % 3)
            moments.append((at, student, teacher))
        watched = WatchedStep(
            step,
            step + 1,
            tuple(Moment(at, s.double(), t.double()) for at, s, t in moments),
            (OptimizerStep(True, False, lr, True),),
            **{"teacher_ran": True, **facts},
        )
        found += wiring.look(watched)
    return found


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["forward", "step", "end", "forward end", "step end"]), st.floats(0.05, 0.99))
def test_where_it_is_updated_is_what_is_told(update: str, m: float) -> None:
    kinds = [flag.kind for flag in run(10, update=update, m=m)]
    expected = ["average_updated_twice"] if " " in update else {"step": ["average_before_step"]}.get(update, [])
    assert kinds == expected


@settings(deadline=None, max_examples=20)
@given(st.floats(0.5, 0.999), st.integers(2, 8))
def test_a_schedule_that_reaches_one_is_no_finding(start: float, steps: int) -> None:
    assert run(24, update="end", scheduled=lambda step: min(1.0, start + (1 - start) * step / steps)) == []


def test_a_step_tells_nothing_of_what_it_did_not_see() -> None:
    """Where the teacher cannot have a hook, it is not known when it ran; where it did not run, it may rest."""
    assert run(10, update="step", teacher_ran=None) == []
    assert run(10, update="", teacher_ran=False) == []
    assert [f.kind for f in run(10, update="", teacher_ran=None)] == ["teacher_stands_still"]
    assert run(2, update="step") == []  # nor is it told of two steps
    for unseen in (None, False):  # an average for evaluation, perhaps
        assert run(10, update="end", m=0.0, teacher_requires_grad=True, teacher_ran=unseen) == []
    assert [f.kind for f in run(10, update="end", m=0.0)] == ["momentum_zero"]


def test_a_student_at_a_learning_rate_of_zero_may_rest() -> None:
    assert [f.kind for f in run(10, update="end", student_requires_grad=False)] == ["student_stands_still"]
    for lr in (0.0, float("nan")):  # nan: on a device that would have to be waited for
        assert run(10, update="end", student_requires_grad=False, lr=lr) == []


def test_each_kind_is_told_once_and_may_be_together() -> None:
    flags = run(30, update="step", teacher_requires_grad=True, noisy=("drop (Dropout)",))
    assert [(f.kind, f.step) for f in flags] == [
        ("teacher_requires_grad", 3),
        ("teacher_in_training_mode", 3),
        ("average_before_step", 4),
    ]
    assert str(flags[0]).startswith("teacher: it requires gradients")
