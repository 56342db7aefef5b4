"""Is it wired right? What a few sampled weights do around training steps becomes findings in words.

Student and teacher are known by some of their values at some moments of a step, and by facts about their modules and
optimizers. An average is recognised by what it does: ``after = m · before + (1 - m) · student`` holds for all sampled
values with one momentum m. What the evidence does not settle is not told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

import torch
from torch import Tensor

from attn_monitor.measurements import HealthFlag

CONFIRMED = 3  # watched steps in a row that must agree
ENOUGH = 8  # sampled values that must tell
SMALLEST_UPDATE = 1e-5  # 1 - m: of an average that is slower than that, nothing might be seen to move

At = Literal["start", "forward", "other step", "step", "batch end", "end"]
"""Before a batch; as the teacher last runs before the step; right after the step of an optimizer that does not hold the
student, or does; where Lightning ends a batch; before the next batch."""


@dataclass(frozen=True)
class Moment:
    """Sampled values of student and teacher, (N,) float64 each, from the same places of the same parameters."""

    at: At
    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class OptimizerStep:
    """``lr`` is the largest learning rate that concerns the student; NaN where it cannot be known without waiting.

    ``has_gradient``: whether a gradient other than 0 had reached the student's sampled parameters.
    """

    holds_student: bool
    holds_teacher: bool
    lr: float
    has_gradient: bool


@dataclass(frozen=True)
class WatchedStep:
    """What was seen from before a batch, with ``begun`` optimizer steps done, to before the next, with ``ended``.

    ``teacher_ran`` is None where that cannot be seen. ``noisy`` are modules of the teacher that were random then, as
    they are in training mode. ``buffers`` are sampled values of the student's and the teacher's.
    """

    begun: int
    ended: int
    moments: tuple[Moment, ...]
    optimizers: tuple[OptimizerStep, ...]
    teacher_ran: bool | None
    noisy: tuple[str, ...] = ()
    teacher_requires_grad: bool = False
    student_requires_grad: bool = True
    buffers: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))


@dataclass(frozen=True)
class Sampled:
    """What is sampled: ``precision`` (N,) of the teacher's arithmetic, the distance from 1 to the next larger number.

    ``scales`` are the parts of the values that belong to one scale of a normalisation layer each, ``buffer`` the name
    of a buffer, if any is sampled.
    """

    precision: Tensor
    scales: tuple[slice, ...] = ()
    buffer: str = ""


@dataclass(frozen=True)
class Update:
    """A move of the teacher towards the student."""

    when: str  # in the step, for people
    momentum: float
    copies: bool  # it has become the student


EARLY = "before the optimizer's step"


def momentum_of(before: Tensor, after: Tensor, student: Tensor, precision: Tensor) -> float | None:
    """The m, from 0 to below 1, with which ``after`` averages the other two, all (N,).

    None where no m does, or where rounding, in arithmetic of this ``precision``, hides which.
    """
    way, moved = student - before, after - before
    rounding = 2 * precision * (before.abs() + student.abs()) + torch.finfo(torch.float32).tiny
    if int((moved.abs() > 4 * rounding).sum()) < min(ENOUGH, len(moved)):
        return None
    weight = rounding**-2
    share = float((weight * way * moved).sum() / (weight * way * way).sum().clamp(min=1e-300))  # 1 - m
    fits = bool(((moved - share * way).abs() <= 2 * rounding).all())
    return max(0.0, 1 - share) if fits and 0 < share <= 1 + 1e-6 else None


class Wiring:
    """Follows a student, and a teacher that may be its average, over watched steps. Each kind of fault is told once.

    ``still_steps``: after how many optimizer steps it is told that one of the two has never moved.
    """

    def __init__(self, sampled: Sampled, still_steps: int) -> None:
        self.sampled, self.still_steps = sampled, still_steps
        self.student_moved = self.teacher_moved = self.averaged = False
        self._first: WatchedStep | None = None
        self._equal = self._fresh = False  # at the first look
        self._agree: dict[str, int] = {}  # watched steps in a row
        self._told: set[str] = set()

    def look(self, watched: WatchedStep) -> list[HealthFlag]:
        """What this step tells, without what was told before."""
        first = self._first = self._first or self._begin(watched)
        updates = self._updates(watched)
        self.student_moved |= any(not torch.equal(m.student, first.moments[0].student) for m in watched.moments)
        self.teacher_moved |= any(not torch.equal(m.teacher, first.moments[0].teacher) for m in watched.moments)
        self.averaged |= bool(updates)
        found = chain(
            self._requires_grad(watched),
            self._training_mode(watched),
            self._order(watched, updates),
            self._momentum_zero(watched, updates),
            self._student_stands_still(watched, first),
            self._teacher_stands_still(watched, first),
            self._buffers(watched, first),
        )
        news = {kind: text for kind, text in found if kind not in self._told}
        self._told.update(news)
        roles = {"student_stands_still": "student"}
        return [
            HealthFlag(kind, roles.get(kind, "teacher"), None, (), watched.ended, None, text)
            for kind, text in news.items()
        ]

    @property
    def begun(self) -> bool:
        """Whether there was a first look."""
        return self._first is not None

    def _begin(self, watched: WatchedStep) -> WatchedStep:
        """Were they equal, and new? Scales of normalisation layers are all 1, or one number, until they are trained."""
        start = watched.moments[0]
        self._equal = self._is_copy(start.teacher, start.student)
        scales = [start.student[part] for part in self.sampled.scales]
        self._fresh = len(scales) > 1 and all(bool((scale == scale[0]).all()) for scale in scales)
        return watched

    def _is_copy(self, teacher: Tensor, student: Tensor) -> bool:
        return bool(((teacher - student).abs() <= self.sampled.precision * student.abs()).all())

    def _updates(self, watched: WatchedStep) -> list[Update]:
        """In order. The student's own move is the last thing before the moment of its optimizer."""
        found, passed = list[Update](), set[str]()
        for a, b in pairwise(watched.moments):
            passed.add(a.at)
            when = EARLY if "forward" in passed or b.at != "forward" else "before its forward"
            when = "after it" if "step" in passed else when
            momentum = momentum_of(a.teacher, b.teacher, a.student, self.sampled.precision)
            if momentum is not None:
                found.append(Update(when, momentum, self._is_copy(b.teacher, a.student)))
        return found

    def _confirmed(self, what: str, holds: bool | None) -> bool:
        """Whether it has held in enough watched steps in a row, of which this is one. None: this one tells nothing."""
        if holds is not None:
            self._agree[what] = self._agree.get(what, 0) + 1 if holds else 0
        return bool(holds) and self._agree[what] >= CONFIRMED

    @property
    def _meant_as_average(self) -> bool:
        """It began as a copy of the student, or has followed it. Any other teacher may be trained as it likes."""
        return self._equal or self.averaged

    def _requires_grad(self, watched: WatchedStep) -> Iterator[tuple[str, str]]:
        """An average that does not run while training is for evaluation, and harmless."""
        holds = watched.teacher_requires_grad and self._meant_as_average if watched.teacher_ran else None
        if not self._confirmed("requires grad", holds):
            return
        if any(o.holds_teacher for o in watched.optimizers):
            yield (
                "teacher_in_optimizer",
                "an optimizer holds it and it requires gradients, although it is an average: gradients that reach it "
                "train it. Call requires_grad_(False) on it, and give the optimizer the student's parameters alone",
            )
        elif "teacher_in_optimizer" not in self._told:
            yield (
                "teacher_requires_grad",
                "it requires gradients, although it is an average. Call requires_grad_(False) on it",
            )

    def _training_mode(self, watched: WatchedStep) -> Iterator[tuple[str, str]]:
        noisy = bool(watched.noisy) and self._meant_as_average if watched.teacher_ran else None
        if self._confirmed("training mode", noisy):
            more = f" and {len(watched.noisy) - 1} more make" if len(watched.noisy) > 1 else " makes"
            yield (
                "teacher_in_training_mode",
                f"it runs in training mode, where {watched.noisy[0]}{more} its targets random. Call eval() on it: "
                "modules begin in training mode, and train() of one around it puts it back",
            )

    def _order(self, watched: WatchedStep, updates: list[Update]) -> Iterator[tuple[str, str]]:
        """Of steps in which the student is updated once: with several optimizers each may have its own average."""
        known = bool(updates) and [o.holds_student for o in watched.optimizers].count(True) == 1
        if self._confirmed("twice", len(updates) > 1 if known else None):
            momenta = " and ".join(f"{update.momentum:.4g}" for update in updates)
            places = ", ".join(dict.fromkeys(update.when for update in updates))
            yield (
                "average_updated_twice",
                f"it is averaged {len(updates)} times a step ({places}), with momenta of {momenta}, in effect "
                f"{math.prod(update.momentum for update in updates):.4g}. Leave out all but one",
            )
        early = [update.when for update in updates] == [EARLY] and bool(watched.teacher_ran)
        if self._confirmed("early", early if known else None):
            yield (
                "average_before_step",
                f"it is averaged with a momentum of {updates[0].momentum:.4g} after it has run and before the "
                "optimizer's step, so that it is a step behind. In Lightning the step comes after training_step: "
                "average in on_train_batch_end",
            )

    def _momentum_zero(self, watched: WatchedStep, updates: list[Update]) -> Iterator[tuple[str, str]]:
        """An average that does not run while training is for evaluation, and may copy until it begins."""
        moves = not torch.equal(watched.moments[0].student, watched.moments[-1].student)
        copies = bool(updates) and all(update.copies for update in updates)
        if self._confirmed("copies", copies if moves and watched.teacher_ran else None):
            yield (
                "momentum_zero",
                "it equals the student after each update: the average has a momentum of 0, or copies instead",
            )

    def _student_stands_still(self, watched: WatchedStep, first: WatchedStep) -> Iterator[tuple[str, str]]:
        """Of a new one beside a teacher that runs: others may be frozen by design."""
        steps, why = watched.ended - first.begun, _why_still(watched)
        still = not self.student_moved and self._fresh and bool(watched.teacher_ran)
        if self._confirmed("student", None if why is None else still) and steps >= self.still_steps:
            yield "student_stands_still", f"it has not moved in {steps:,} steps: {why}"

    def _teacher_stands_still(self, watched: WatchedStep, first: WatchedStep) -> Iterator[tuple[str, str]]:
        """Of the copy of a new student: that of a trained one, or a model of its own, may be a teacher by design."""
        start, now, steps = first.moments[0], watched.moments[-1], watched.ended - first.begun
        way = SMALLEST_UPDATE * (now.student - start.teacher).abs()
        seen = int((way > 2 * self.sampled.precision * start.teacher.abs()).sum()) >= min(ENOUGH, len(way))
        still = not self.teacher_moved and self._fresh and self._equal and watched.teacher_ran is not False
        if self._confirmed("teacher", still and seen) and steps >= self.still_steps:
            yield (
                "teacher_stands_still",
                f"it has not moved in {steps:,} steps, and the student has: its average is never updated, or with a "
                "momentum of 1",
            )

    def _buffers(self, watched: WatchedStep, first: WatchedStep) -> Iterator[tuple[str, str]]:
        """Those of an average for evaluation may be made when training is over, as by PyTorch's `update_bn`."""
        steps = watched.ended - first.begun
        student, teacher = (not torch.equal(a, b) for a, b in zip(watched.buffers, first.buffers, strict=True))
        forgotten = student and not teacher and self.averaged if watched.teacher_ran else None
        if self._confirmed("buffers", forgotten) and steps >= self.still_steps:
            yield (
                "average_forgets_buffers",
                f"its parameters are averaged and its buffers are not: those such as {self.sampled.buffer} have stayed "
                f"as they were for {steps:,} steps, while the student's have changed. Copy or average buffers() too",
            )


def _why_still(watched: WatchedStep) -> str | None:
    """Why a student that stands still does; None where this step cannot tell, as at a learning rate of 0."""
    stepped = [o for o in watched.optimizers if o.lr > 0]
    if not stepped:
        return None
    if not watched.student_requires_grad:
        return "all of it is frozen (requires_grad is False)"
    if not any(o.holds_student for o in watched.optimizers):
        return "no optimizer that stepped holds its parameters"
    holding = [o for o in stepped if o.holds_student]
    if not holding or any(o.has_gradient for o in holding):
        return None
    return "no gradient reaches it, as after a detach(), under no_grad(), or where the loss is of another model"
