"""Decide when to take a snapshot, with the arguments of Lightning's `ModelCheckpoint`."""

from __future__ import annotations

import math

from attn_monitor.errors import ArgumentError, check_whole

SNAPSHOTS, FEWEST = 50, 10  # in a run without a schedule: in a long one, and in a short one
CLOSEST = 6  # steps between them, unless that makes less than `FEWEST`
OPEN_ENDED = 50  # steps between the first snapshots of a run of unknown length


class Schedule:
    """Decide from the step alone, so that a resumed run goes on as if it had never stopped.

    Args:
        every_n_train_steps: optimizer steps between snapshots, at least 1.
        every_n_epochs: epochs between snapshots, at least 1. With neither, a run has 50 snapshots, one of less than 300
            steps one every six steps, and at least ten; one of unknown length takes them at growing distances, steps 1,
            2, 4, …, 64 and then 50 steps and more. `postpone` puts off one of these.

    Raises:
        ArgumentError: A number is invalid, or both are given.
    """

    def __init__(self, every_n_train_steps: int | None = None, every_n_epochs: int | None = None) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
            check_whole(name, value, 1, "a whole number of at least 1, or None")
        if every_n_train_steps is not None and every_n_epochs is not None:
            raise ArgumentError(
                f"every_n_train_steps={every_n_train_steps}, every_n_epochs={every_n_epochs}: expected only one of them"
            )
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.last_step: int | None = None
        self.not_before = 0  # step until which the next one is put off
        self._interval: int | None = every_n_train_steps
        self._total_steps = self._epochs = math.inf
        self._epoch_steps: int | None = None  # between the latest two snapshots, with `every_n_epochs`

    def start(self, total_steps: float, epochs: float = math.inf) -> None:
        """Set the length of the run in steps and in epochs, infinite if it is unknown."""
        self._total_steps, self._epochs = total_steps, epochs
        if self.every_n_train_steps is None and self.every_n_epochs is None:
            count = min(SNAPSHOTS, max(FEWEST, total_steps / CLOSEST))
            self._interval = max(1, round(total_steps / count)) if math.isfinite(total_steps) else None

    @property
    def is_given(self) -> bool:
        """Whether the user has given the distance of snapshots."""
        return self.every_n_train_steps is not None or self.every_n_epochs is not None

    def __str__(self) -> str:
        if self.every_n_epochs is not None:
            return "every epoch" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs"
        if self._interval is None:
            return "at ever wider distances, as the length of the run is not known"
        return "every step" if self._interval == 1 else f"every {self._interval} steps"

    def count(self) -> float | None:
        """Return how many snapshots the run will take at most, None if that is unknown."""
        total, each = self._total_steps, self._interval
        if self.every_n_epochs is not None:
            total, each = self._epochs, self.every_n_epochs
        if each is None or not math.isfinite(total):
            return None
        return total // each + 1 + (total % each > 0)

    def due(self, step: int) -> bool:
        """Whether to take a snapshot after this many optimizer steps, before the next batch."""
        if self.last_step is None:
            return True
        if step <= self.last_step or step < self.not_before or self.every_n_epochs is not None:
            return False
        return step >= self._following(self.last_step)

    def next_due(self) -> int | None:
        """Return the step of the next snapshot, unless it is put off; None if it is not known."""
        last = self.last_step
        if last is None:
            return None
        if self.every_n_epochs is not None:
            return None if self._epoch_steps is None else last + self._epoch_steps
        due = max(self._following(last), self.not_before)
        return int(min(due, self._total_steps)) if self._total_steps > last else due

    def postpone(self, step: int) -> None:
        """Take none before this step; of several at one distance, before the first that is due from then on."""
        self.not_before = step if self._interval is None else -(-step // self._interval) * self._interval

    def _following(self, last: int) -> int:
        if self._interval is not None:
            # Not every multiple is met: with several optimizers the step counter skips numbers.
            return (last // self._interval + 1) * self._interval
        # Unknown length: close at first, as the run may be short, then wider, so that an endless one stays readable.
        return last + min(max(1, last), max(OPEN_ENDED, last // 10))

    def due_at_epoch_end(self, epoch: int, step: int) -> bool:
        """Whether to take a snapshot at the end of this epoch (counted from 0)."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0 and step != self.last_step

    def set_last_step(self, step: int | None) -> None:
        """Remember the step of the latest snapshot; None if there is none."""
        known = step is not None and self.last_step is not None and step > self.last_step
        self._epoch_steps = step - self.last_step if known else self._epoch_steps  # type: ignore[operator]
        self.last_step, self.not_before = step, 0
