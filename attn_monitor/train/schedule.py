"""Decide when to take a snapshot, with the arguments of Lightning's `ModelCheckpoint`."""

from __future__ import annotations

import math

from attn_monitor.errors import ArgumentError

SNAPSHOTS = 50  # per run without a schedule
OPEN_ENDED = 50  # steps between the first snapshots of a run of unknown length


class Schedule:
    """Decide from the step alone, so that a resumed run goes on as if it had never stopped.

    Args:
        every_n_train_steps: optimizer steps between snapshots, at least 1.
        every_n_epochs: epochs between snapshots, at least 1. With neither, a run has about 50 snapshots; one of unknown
            length takes them at growing intervals.

    Raises:
        ArgumentError: A number is invalid, or both are given.
    """

    def __init__(self, every_n_train_steps: int | None = None, every_n_epochs: int | None = None) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{name}={value!r}: expected a whole number of at least 1, or None")
        if every_n_train_steps is not None and every_n_epochs is not None:
            raise ArgumentError(
                f"every_n_train_steps={every_n_train_steps}, every_n_epochs={every_n_epochs}: expected only one of them"
            )
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.last_step: int | None = None
        self._interval: int | None = every_n_train_steps
        self._total_steps = math.inf
        self._epoch_steps: int | None = None  # between the latest two snapshots, with `every_n_epochs`

    def start(self, total_steps: float) -> None:
        """Set the length of the run in steps, infinite if it is unknown."""
        self._total_steps = total_steps
        if self.every_n_train_steps is None and self.every_n_epochs is None:
            self._interval = max(1, round(total_steps / SNAPSHOTS)) if math.isfinite(total_steps) else None

    def __str__(self) -> str:
        if self.every_n_epochs is not None:
            return "every epoch" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs"
        if self._interval is None:
            return "at ever wider distances, as the length of the run is not known,"
        return "every step" if self._interval == 1 else f"every {self._interval} steps"

    def count(self) -> float | None:
        """Return how many snapshots the run will take, None if that is unknown."""
        total = self._total_steps
        if self._interval is None or not math.isfinite(total):
            return None
        return total // self._interval + 1 + (total % self._interval > 0)

    def due(self, step: int) -> bool:
        """Whether to take a snapshot after this many optimizer steps, before the next batch."""
        if self.last_step is None:
            return True
        if step <= self.last_step or self.every_n_epochs is not None:
            return False
        if self._interval is None:  # unknown length: at growing intervals, so that an endless run stays readable
            return step >= self.last_step + max(OPEN_ENDED, self.last_step // 10)
        # Not a remainder: with several optimizers the step counter skips numbers.
        return step // self._interval > self.last_step // self._interval

    def next_due(self) -> int | None:
        """Return the step of the next snapshot; None if it is not known, as there may be an early one."""
        last = self.last_step
        if last is None or (self._interval is None and self.every_n_epochs is None and last < OPEN_ENDED):
            return None
        if self.every_n_epochs is not None:
            return None if self._epoch_steps is None else last + self._epoch_steps
        due = last + max(OPEN_ENDED, last // 10)
        if self._interval is not None:
            due = (last // self._interval + 1) * self._interval
        return int(min(due, self._total_steps)) if self._total_steps > last else due

    def due_early(self, step: int) -> bool:
        """Whether to take an extra snapshot, if that is cheap, as a run of unknown length may be short.

        Extra snapshots are at steps 1, 2, 4, …, 32.
        """
        if self.last_step is None or self._interval is not None or self.every_n_epochs is not None:
            return False
        return max(1, 2 * self.last_step) <= step < OPEN_ENDED

    def due_at_epoch_end(self, epoch: int, step: int) -> bool:
        """Whether to take a snapshot at the end of this epoch (counted from 0)."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0 and step != self.last_step

    def taken(self, step: int | None) -> None:
        """Remember the step of the latest snapshot; None if there is none."""
        known = step is not None and self.last_step is not None and step > self.last_step
        self._epoch_steps = step - self.last_step if known else self._epoch_steps  # type: ignore[operator]
        self.last_step = step
