"""What runs behind training: a queue and a thread for each destination, and the time that waiting for them may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from attn_monitor.publish.failures import Failures, Paused
from attn_monitor.workers import Cancelled, Worker, is_cancelled

PATIENCE = 60.0  # seconds that all waits of a run may hold it up together
ROOM_PATIENCE = 5.0  # of these, for room in the queue of one destination that is slow
LAST_WORDS = 5.0  # and when an exception ends the run
KEPT_BYTES = 64 * 2**20  # that wait for one destination
WAITING = 4  # jobs of a part, such as pictures, that wait and that one may also go without
TRIES = 10  # of a job that is kept
UNANSWERED = 60.0  # seconds after which a destination is said not to answer
DISK_PATIENCE = 20.0  # that the training thread waits for something of a disk

Result = TypeVar("Result")


class Patience:
    """The seconds that a run may still be held up by waiting: all its waits take from them."""

    def __init__(self, seconds: float | None = None) -> None:
        self.left = PATIENCE if seconds is None else seconds

    def wait(self, changed: threading.Condition, until: Callable[[], bool], seconds: float) -> bool:
        """Wait on a condition that is held, for ``seconds`` at most; whether it came true."""
        started = time.monotonic()
        try:
            return changed.wait_for(until, max(0.0, min(seconds, self.left)))
        finally:
            self.left = max(0.0, self.left - (time.monotonic() - started))

    def limit(self, seconds: float) -> None:
        """Leave no more than this."""
        self.left = min(self.left, seconds)

    @property
    def for_now(self) -> float:
        """What may be waited before the end of the run, for which half is kept: a slow logger must not take all."""
        return self.left - PATIENCE / 2


def within(
    patience: Patience,
    seconds: float,
    action: Callable[[], Result],
    late: Callable[[Result], object] = lambda result: None,
) -> Result:
    """What an action on a disk returns or raises, done on another thread; `TimeoutError` after so many seconds.

    What it returns after that is given to ``late``. Where the system gives no thread, it is done on this one.
    """
    changed, ended, seconds = threading.Condition(), False, max(0.0, min(seconds, patience.left))
    results, errors = list[Result](), list[BaseException]()

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)
        with changed:
            changed.notify_all()
            waited_for = not ended
        if results and not waited_for:
            late(results[0])

    worker = Worker("disk", run)
    try:
        worker.start()
    except RuntimeError:
        return action()
    with changed:
        ended = not patience.wait(changed, lambda: bool(results or errors), seconds)
    if ended:
        worker.cancel()
        raise TimeoutError(f"not done after {seconds:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


@dataclass(eq=False)
class Job:
    """Something to do at a destination. ``keep``: tried again when it fails; else done once or left out."""

    part: str
    step: int | None  # None: of the run as a whole
    action: Callable[[], object]
    size: int = 0  # bytes of memory
    keep: bool = True
    tries: int = 0


class Outbox:
    """The jobs for one destination, done one after another on a thread of its own: one that hangs starves only itself.

    At most ``KEPT_BYTES`` of jobs that are kept wait, and of the others ``WAITING`` of a part; beyond that the oldest
    are left out.
    ``patient`` keeps a job that fails with an OSError for as long as the run lasts, not for ``TRIES``.
    ``seconds`` is the time spent on jobs so far, ``last_step`` that of the latest job done.
    """

    def __init__(self, name: str, failures: Failures, patience: Patience, *, patient: bool = False) -> None:
        self.name, self.seconds = name, 0.0
        self.last_step: int | None = None
        self._failures, self._patience, self._patient = failures, patience, patient
        self._jobs: list[Job] = []  # the one that runs included
        self._changed = threading.Condition()
        self._thread: Worker | None = None
        self._running: Job | None = None
        self._since = 0.0  # when it began, in `time.monotonic`
        self._closing, self._done, self._gave_up = False, 0, -1  # _gave_up: what _done was when a wait was in vain

    def put(self, job: Job) -> None:
        """Queue a job. Waits a while for room, but not where the destination fails or has not moved since last time."""
        with self._changed:
            self._closing = False
            failing = self._jobs and (self._thread is None or self._failures.pause(self._jobs[0].part) > 0)
            if not self._has_room(job) and not failing and self._gave_up != self._done:
                seconds = min(ROOM_PATIENCE, self._patience.for_now)
                if not self._patience.wait(self._changed, lambda: self._has_room(job), seconds):
                    self._gave_up = self._done
            self._jobs.append(job)
            self._leave_out()
            if (error := self._start()) is not None:
                self._failures.failed(self._jobs[0].part, error)
            late = self._running if time.monotonic() - self._since > UNANSWERED else None
            if late is not None and not self._failures.fails(late.part):
                self._failures.failed(late.part, TimeoutError(f"no answer for {UNANSWERED:.0f} s"))
            self._changed.notify_all()

    def drain(self, patience: Patience) -> bool:
        """Wait until all is done; False when that takes too long, or what is left fails at present."""

        def failing() -> bool:
            return bool(self._jobs) and self._failures.pause(self._jobs[0].part) > 0

        with self._changed:
            patience.wait(self._changed, lambda: not self._jobs or failing(), PATIENCE)
            return not self._jobs

    def close(self) -> None:
        """Try what is left once more, end the thread, and account for the rest.

        A thread that takes too long is given up: it ends between two images or files, or where it hangs when that ends.
        """
        with self._changed:
            self._closing, error = True, self._start()
            self._changed.notify_all()
            if self._thread is not None:
                self._patience.wait(self._changed, lambda: self._thread is None, PATIENCE)
            for job in self._jobs:
                self._failures.lost(job.part, job.step, error or TimeoutError(f"no answer from {self.name}"))
            self._jobs.clear()
            if self._thread is not None:
                self._thread.cancel()

    def _start(self) -> RuntimeError | None:
        """Start the thread if there is something to do and none yet; why the system gives none, if it does not."""
        if self._thread is None and self._jobs:
            worker = Worker(self.name, self._run, self._wake)
            try:
                worker.start()
            except RuntimeError as error:
                return error
            self._thread = worker
        return None

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_room(self, job: Job) -> bool:
        if not job.keep:
            return sum(j.part == job.part for j in self._jobs) < WAITING
        return sum(j.size for j in self._jobs) + job.size <= KEPT_BYTES

    def _leave_out(self) -> None:
        waiting = [job for job in self._jobs if job is not self._running]
        dispensable = [job for job in waiting if not job.keep]
        # Drawn pictures of a step are some 50 MB: for one that hangs, only the latest wait.
        few = 1 if self._gave_up == self._done else WAITING
        surplus = [job for i, job in enumerate(dispensable) if sum(j.part == job.part for j in dispensable[i:]) > few]
        kept, size = [job for job in waiting if job.keep], sum(job.size for job in self._jobs)
        while size > KEPT_BYTES and len(kept) > 1:
            surplus.append(kept.pop(0))
            size -= surplus[-1].size
        for job in surplus:
            self._jobs.remove(job)
            self._failures.lost(job.part, job.step, TimeoutError(f"{self.name} is too slow"))

    def _run(self) -> None:
        while (job := self._next()) is not None:
            started = time.perf_counter()
            error = self._try(job)
            with self._changed:
                self.seconds += time.perf_counter() - started
                self._running, job.tries = None, job.tries + 1
                lasting = self._patient and isinstance(error, (OSError, Paused))
                again = lasting or job.tries < TRIES
                if self._closing:  # no time to wait for the next try
                    again = not self._failures.pause(job.part)
                if job in self._jobs and not (error is not None and job.keep and again):
                    self._jobs.remove(job)
                    self._done += 1
                    if error is not None:
                        self._failures.lost(job.part, job.step)
                    elif job.step is not None:
                        self.last_step = job.step
                self._changed.notify_all()
            del job, error  # with the pictures they hold, until there is something to do again

    def _next(self) -> Job | None:
        """The job to do now; None when the outbox is closed and empty, which ends the thread."""
        with self._changed:
            while True:
                job = self._jobs[0] if self._jobs else None
                if is_cancelled() or (job is None and self._closing):
                    self._thread = None
                    self._changed.notify_all()
                    return None
                pause = 0.0 if job is None or self._closing or not job.keep else self._failures.pause(job.part)
                if job is not None and not pause:
                    self._running, self._since = job, time.monotonic()
                    return job
                self._changed.wait(pause or None)

    def _try(self, job: Job) -> BaseException | None:
        if not self._closing and self._failures.pause(job.part):
            return Paused()  # pictures of a logger that fails at present
        try:
            job.action()
        except Cancelled as error:  # which was told when it was
            return error
        except BaseException as error:  # whatever it is, SystemExit too, must not end the thread
            self._failures.failed(job.part, error)
            return error
        self._failures.worked(job.part)
        return None
