"""`Destination`: a tracker with its queue, which logs events in the background."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from attn_monitor.background.disk_reserve import require_space
from attn_monitor.background.failures import Failures
from attn_monitor.background.job_queue import Job, JobQueue
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.trackers.events import Animation, Event, Picture, Scalars
from attn_monitor.trackers.tracker import Tracker
from attn_monitor.workers import safe_point


class Destination:
    """Log events to one tracker in the background.

    Args:
        tracker: where to log.
        label: the tracker's name in messages.
        failures: records what fails.
        budget: how long the queue may wait at the end.
        disk_reserve: bytes that pictures leave free, see `require_space`.
    """

    def __init__(
        self, tracker: Tracker, label: str, failures: Failures, budget: WaitBudget, disk_reserve: int | None
    ) -> None:
        self.tracker, self.label, self.queue = tracker, label, JobQueue(label, failures, budget)
        self.first: list[Event[Any]] = []
        """Events to log once, together with the next ones; each is retried until it succeeds."""
        self._failures, self._reserve = failures, disk_reserve
        self._late: list[tuple[Scalars, Callable[[], bool], int]] = []

    def put_scalars(self, scalars: Scalars, step: int) -> None:
        """Queue numbers, which are retried when they fail."""
        if Scalars not in self.tracker.methods:
            return
        part, log = f"logging metrics to {self.label}", partial(self._log_scalars, scalars, step)
        if not self.tracker.scalars_on_training_thread:
            self.queue.put(Job(part, step, log, size=200 * len(scalars.content)))
        elif not self._failures.attempt(part, log):
            self._failures.lost(part, step)

    def put_late(self, scalars: Scalars, known: Callable[[], bool], step: int) -> None:
        """Queue numbers that take long to compute; a tracker on the training thread gets them when they are known."""
        if Scalars not in self.tracker.methods:
            return
        if self.tracker.scalars_on_training_thread:
            self._late.append((scalars, known, step))
        else:
            log = partial(self._log_scalars, scalars, step)
            self.queue.put(Job(f"logging metrics to {self.label}", step, log))

    def log_late(self, *, unknown: bool = False) -> None:
        """Log late numbers that are known by now on this thread, ``unknown`` ones too at the end of the run."""
        ready = [late for late in self._late if unknown or late[1]()]
        self._late = [late for late in self._late if late not in ready]
        for scalars, _, step in ready:
            part = f"logging metrics to {self.label}"
            if not self._failures.attempt(part, partial(self._log_scalars, scalars, step)):
                self._failures.lost(part, step)

    def put(self, what: str, events: Sequence[Event[Any]], at: int, step: int | None) -> None:
        """Queue events of the kinds that the tracker takes; they are not retried.

        Args:
            what: the events' name in messages, such as "pictures".
            events: events of one step.
            at: the step to log them at.
            step: the step that messages name, None for events of the whole run.
        """
        taken = [event for event in events if type(event) in self.tracker.methods]
        if taken:
            part = f"{what} to {self.label}"
            self.queue.put(Job(f"logging {part}", step, partial(self._log, part, taken, at), retry=False))

    def _log_scalars(self, scalars: Scalars, step: int) -> None:
        if scalars.content:
            with self.tracker.batch(step) as log:
                log(scalars)

    def _log(self, part: str, events: Sequence[Event[Any]], step: int) -> None:
        """Log events, going on after one that fails; raise the first error if all fail."""
        tracker, some, together = self.tracker, f"logging some {part}", [*self.first, *events]
        large = any(isinstance(event, (Picture, Animation)) for event in together)
        errors: dict[Event[Any], Exception] = {}
        with tracker.batch(step) as log:
            for event in together:
                safe_point()
                try:
                    if large:
                        require_space(tracker.media_folder, tracker.stored_bytes(event), self._reserve)
                    log(event)
                except Exception as error:
                    errors[event] = error
        self.first = [event for event in self.first if event in errors]
        if len(errors) == len(together):
            raise next(iter(errors.values()))
        if not errors:
            self._failures.worked(some)
            return
        (failed, reason), *more = errors.items()
        self._failures.failed(some, reason, about=f"{failed.tag}{f' and {len(more)} more' if more else ''}: ")
        self._failures.lost(some, step)
