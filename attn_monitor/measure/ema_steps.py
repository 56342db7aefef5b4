"""What is sampled around one training step of a student and its teacher, and the EMA update that it shows.

An EMA update is recognised by ``after = m · before + (1 - m) · student``, which holds for all sampled values with one
momentum m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ENOUGH = 8  # sampled values that must have moved
EARLY = "before the optimizer's step"  # a place in the step, for messages

At = Literal["start", "forward", "other step", "step", "batch end", "end"]
"""Moments in order: before a batch; the teacher's last forward before the optimizer step; right after the step of an
optimizer without, and with, the student's parameters; Lightning's end of the batch; before the next batch."""


@dataclass(frozen=True)
class Moment:
    """Sampled values of student and teacher at one moment, (N,) float64 each, from the same parameters."""

    at: At
    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class OptimizerStep:
    """One step of one optimizer.

    Args:
        holds_student: The optimizer holds parameters of the student.
        holds_teacher: The optimizer holds parameters of the teacher.
        lr: Largest learning rate of the student's parameters; NaN if reading it would synchronise the device.
        has_gradient: A nonzero gradient had reached the student's sampled parameters.
    """

    holds_student: bool
    holds_teacher: bool
    lr: float
    has_gradient: bool


@dataclass(frozen=True)
class WatchedStep:
    """Observations from before one batch to before the next.

    Args:
        begun: Number of optimizer steps before the batch.
        ended: Number of optimizer steps after it.
        moments: Sampled values in order of time.
        optimizers: Optimizer steps in order of time.
        teacher_ran: The teacher ran a forward; None if that cannot be observed.
        noisy: Modules of the teacher that are random because they are in training mode.
        teacher_requires_grad: A parameter of the teacher requires gradients.
        student_requires_grad: A parameter of the student requires gradients.
        buffers: Sampled values of the student's and the teacher's buffer.
    """

    begun: int
    ended: int
    moments: tuple[Moment, ...]
    optimizers: tuple[OptimizerStep, ...]
    teacher_ran: bool | None
    noisy: tuple[str, ...] = ()
    teacher_requires_grad: bool = False
    student_requires_grad: bool = True
    buffers: tuple[Tensor, Tensor] = (torch.empty(0, device="cpu"), torch.empty(0, device="cpu"))


@dataclass(frozen=True)
class Sampled:
    """Description of the sampled values.

    Args:
        precision: Machine epsilon of the teacher's arithmetic for each value, (N,).
        scales: Slices of the values that are weights of one normalisation layer each.
        buffer: Name of the sampled buffer, empty if there is none.
    """

    precision: Tensor
    scales: tuple[slice, ...] = ()
    buffer: str = ""


@dataclass(frozen=True)
class Update:
    """A move of the teacher towards the student."""

    when: str  # the place in the step, for messages
    momentum: float
    copies: bool  # the teacher equals the student now


def momentum_of(before: Tensor, after: Tensor, student: Tensor, precision: Tensor) -> float | None:
    """Return the m in 0 <= m < 1 with ``after = m · before + (1 - m) · student``.

    Args:
        before: The teacher's values before, (N,).
        after: The teacher's values after, (N,).
        student: The student's values, (N,).
        precision: Machine epsilon of the teacher's arithmetic, (N,).

    Returns:
        The momentum; None if no m fits all values, or if rounding hides it.
    """
    way, moved = student - before, after - before
    rounding = 2 * precision * (before.abs() + student.abs()) + torch.finfo(torch.float32).tiny
    if int((moved.abs() > 4 * rounding).sum()) < min(ENOUGH, len(moved)):
        return None
    weight = rounding**-2
    share = float((weight * way * moved).sum() / (weight * way * way).sum().clamp(min=1e-300))  # 1 - m
    fits = bool(((moved - share * way).abs() <= 2 * rounding).all())
    return max(0.0, 1 - share) if fits and 0 < share <= 1 + 1e-6 else None
