"""Checks of how a teacher follows its student, from a few weights that are sampled around training steps.

The input is sampled values of both at several moments of a step, and facts about their modules and optimizers
(`ema_steps`). Findings that the evidence does not settle are not reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, pairwise

import torch
from torch import Tensor

from attn_monitor.measure.ema_steps import EARLY, ENOUGH, Sampled, Update, WatchedStep, momentum_of
from attn_monitor.measurements import HealthFlag

CONFIRMED = 3  # consecutive watched steps that must agree
SMALLEST_UPDATE = 1e-5  # 1 - m: slower averages may not move visibly


class EmaChecker:
    """Check a student, and a teacher that may be its EMA, over watched steps; report each kind of fault once.

    Args:
        sampled: Description of the sampled values.
        stall_steps: Number of optimizer steps after which a student or teacher that never changed is reported.
    """

    def __init__(self, sampled: Sampled, stall_steps: int) -> None:
        self.sampled, self.stall_steps = sampled, stall_steps
        self.student_moved = self.teacher_moved = self.averaged = False
        self._first: WatchedStep | None = None
        self._equal = self._fresh = False  # at the first watched step
        self._agree: dict[str, int] = {}  # consecutive watched steps
        self._reported: set[str] = set()

    def look(self, watched: WatchedStep) -> list[HealthFlag]:
        """Return the flags of this step that were not reported before."""
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
        new = {kind: text for kind, text in found if kind not in self._reported}
        self._reported.update(new)
        roles = {"student_stands_still": "student"}
        return [
            HealthFlag(kind, roles.get(kind, "teacher"), None, (), watched.ended, None, text)
            for kind, text in new.items()
        ]

    @property
    def begun(self) -> bool:
        """Return True once a step has been watched."""
        return self._first is not None

    def _begin(self, watched: WatchedStep) -> WatchedStep:
        """Store whether both are equal, and new: weights of a normalisation layer are constant until trained."""
        start = watched.moments[0]
        self._equal = self._is_copy(start.teacher, start.student)
        scales = [start.student[part] for part in self.sampled.scales]
        self._fresh = len(scales) > 1 and all(bool((scale == scale[0]).all()) for scale in scales)
        return watched

    def _is_copy(self, teacher: Tensor, student: Tensor) -> bool:
        return bool(((teacher - student).abs() <= self.sampled.precision * student.abs()).all())

    def _updates(self, watched: WatchedStep) -> list[Update]:
        """List the teacher's updates in order. The student itself moves right before its optimizer's moment."""
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
        """Return True once ``holds`` was True in `CONFIRMED` consecutive steps; None leaves the count unchanged."""
        if holds is not None:
            self._agree[what] = self._agree.get(what, 0) + 1 if holds else 0
        return bool(holds) and self._agree[what] >= CONFIRMED

    @property
    def _meant_as_average(self) -> bool:
        """True if it began as a copy of the student or has followed it; another teacher may be trained by itself."""
        return self._equal or self.averaged

    def _requires_grad(self, watched: WatchedStep) -> Iterator[tuple[str, str]]:
        """Check that an average requires no gradients; one that never runs in training is for evaluation."""
        holds = watched.teacher_requires_grad and self._meant_as_average if watched.teacher_ran else None
        if not self._confirmed("requires grad", holds):
            return
        if any(o.holds_teacher for o in watched.optimizers):
            yield (
                "teacher_in_optimizer",
                "an optimizer holds it and it requires gradients, although it is an average: gradients that reach it "
                "train it. Call requires_grad_(False) on it, and give the optimizer the student's parameters alone",
            )
        elif "teacher_in_optimizer" not in self._reported:
            yield (
                "teacher_requires_grad",
                "it requires gradients, although it is an average. Call requires_grad_(False) on it",
            )

    def _training_mode(self, watched: WatchedStep) -> Iterator[tuple[str, str]]:
        """Check that an average that runs has no random modules."""
        noisy = bool(watched.noisy) and self._meant_as_average if watched.teacher_ran else None
        if self._confirmed("training mode", noisy):
            more = f" and {len(watched.noisy) - 1} more make" if len(watched.noisy) > 1 else " makes"
            yield (
                "teacher_in_training_mode",
                f"it runs in training mode, where {watched.noisy[0]}{more} its targets random. Call eval() on it: "
                "new modules are in training mode, and train() of a parent module restores it",
            )

    def _order(self, watched: WatchedStep, updates: list[Update]) -> Iterator[tuple[str, str]]:
        """Check when and how often the average is updated, if the student is updated once in the step."""
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
        """Check that an average that runs does not equal the student; one for evaluation may copy until it starts."""
        moves = not torch.equal(watched.moments[0].student, watched.moments[-1].student)
        copies = bool(updates) and all(update.copies for update in updates)
        if self._confirmed("copies", copies if moves and watched.teacher_ran else None):
            yield (
                "momentum_zero",
                "it equals the student after each update: the average has a momentum of 0, or copies instead",
            )

    def _student_stands_still(self, watched: WatchedStep, first: WatchedStep) -> Iterator[tuple[str, str]]:
        """Check that a new student beside a teacher that runs changes; others may be frozen by design."""
        steps, why = watched.ended - first.begun, _why_still(watched)
        still = not self.student_moved and self._fresh and bool(watched.teacher_ran)
        if self._confirmed("student", None if why is None else still) and steps >= self.stall_steps:
            yield "student_stands_still", f"it has not moved in {steps:,} steps: {why}"

    def _teacher_stands_still(self, watched: WatchedStep, first: WatchedStep) -> Iterator[tuple[str, str]]:
        """Check that the copy of a new student changes; a trained one, or another model, may be frozen by design."""
        start, now, steps = first.moments[0], watched.moments[-1], watched.ended - first.begun
        way = SMALLEST_UPDATE * (now.student - start.teacher).abs()
        seen = int((way > 2 * self.sampled.precision * start.teacher.abs()).sum()) >= min(ENOUGH, len(way))
        still = not self.teacher_moved and self._fresh and self._equal and watched.teacher_ran is not False
        if self._confirmed("teacher", still and seen) and steps >= self.stall_steps:
            yield (
                "teacher_stands_still",
                f"it has not moved in {steps:,} steps, and the student has: its average is never updated, or with a "
                "momentum of 1",
            )

    def _buffers(self, watched: WatchedStep, first: WatchedStep) -> Iterator[tuple[str, str]]:
        """Check that buffers follow too, if the average runs: `update_bn` may compute them after training."""
        steps = watched.ended - first.begun
        student, teacher = (not torch.equal(a, b) for a, b in zip(watched.buffers, first.buffers, strict=True))
        forgotten = student and not teacher and self.averaged if watched.teacher_ran else None
        if self._confirmed("buffers", forgotten) and steps >= self.stall_steps:
            yield (
                "average_forgets_buffers",
                f"its parameters are averaged and its buffers are not: {self.sampled.buffer} has not changed in "
                f"{steps:,} steps, while the student's has. Copy or average buffers() too",
            )


def _why_still(watched: WatchedStep) -> str | None:
    """Return why the student does not change; None if the step does not show it, as at a learning rate of 0."""
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
    return "no gradient reaches it: look for detach(), no_grad() or a loss of another model"
