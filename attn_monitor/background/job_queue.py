"""`JobQueue`: the jobs of one destination, done in order on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from attn_monitor.background.failures import Failures
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.workers import Cancelled, Worker, is_cancelled

KEPT_BYTES = 64 * 2**20  # of jobs with retries that wait for one destination
WAITING = 32  # jobs of a part without retries that wait
TRIES = 10  # of a job with retries
UNANSWERED = 60.0  # seconds after which a destination counts as failing


@dataclass(eq=False)
class Job:
    """Something to do at a destination.

    Args:
        part: what `Failures` calls it.
        step: training step that it belongs to; None: the run as a whole.
        action: does it, and raises where that fails.
        size: bytes of memory that it holds.
        retry: whether it is tried again when it fails.
    """

    part: str
    step: int | None
    action: Callable[[], object]
    size: int = 0
    retry: bool = True
    tries: int = 0


class JobQueue:
    """Does the jobs of one destination one after another: a destination that hangs holds up nothing else.

    Those with retries come first, so that metrics do not wait for pictures. `put` never waits: beyond ``KEPT_BYTES`` of
    jobs with retries, and ``WAITING`` jobs of a part without, the oldest are dropped. ``seconds`` is the time spent on
    jobs so far, ``last_step`` the step of the latest job done.

    Args:
        name: of the destination, in messages.
        failures: gets what fails, and says when to retry.
        budget: of seconds that `close` may wait.
        persistent: retry after an OSError for as long as the run lasts, not ``TRIES`` times.
    """

    def __init__(self, name: str, failures: Failures, budget: WaitBudget, *, persistent: bool = False) -> None:
        self.name, self.seconds = name, 0.0
        self.last_step: int | None = None
        self._failures, self._budget, self._persistent = failures, budget, persistent
        self._jobs: list[Job] = []  # the one that runs included
        self._running: Job | None = None
        self._since = 0.0  # when it began, in `time.monotonic`
        self._changed = threading.Condition()
        self._worker: Worker | None = None
        self._closing = False

    def put(self, job: Job) -> None:
        """Queue a job."""
        with self._changed:
            self._closing = False
            self._jobs.append(job)
            while (surplus := self._surplus()) is not None:
                self._jobs.remove(surplus)
                self._failures.lost(surplus.part, surplus.step, TimeoutError(f"{self.name} is too slow"))
            if (error := self._start()) is not None:
                self._failures.failed(job.part, error)
            late = self._running if time.monotonic() - self._since > UNANSWERED else None
            if late is not None and not self._failures.fails(late.part):
                self._failures.failed(late.part, TimeoutError(f"no answer for {UNANSWERED:.0f} s"))
            self._changed.notify_all()

    def drain(self, budget: WaitBudget) -> bool:
        """Wait until all is done; False when that takes too long, or what is left fails at present."""

        def failing() -> bool:
            return (job := self._first()) is not None and self._failures.pause(job.part) > 0

        with self._changed, budget.spend() as seconds:
            self._changed.wait_for(lambda: not self._jobs or failing(), seconds)
            return not self._jobs

    def close(self) -> None:
        """Try what is left once more, end the thread, and record what was not done.

        A thread that takes too long is cancelled: it ends at its next `safe_point`, or when what it waits for answers.
        """
        with self._changed, self._budget.spend() as seconds:
            self._closing, error = True, self._start()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._worker is None, seconds)
            for job in self._jobs:
                self._failures.lost(job.part, job.step, error or TimeoutError(f"no answer from {self.name}"))
            self._jobs.clear()
            if self._worker is not None:
                self._worker.cancel()

    def _start(self) -> RuntimeError | None:
        """Start the thread if there is something to do and none yet; why the system starts none, if it does not."""
        if self._worker is None and self._jobs:
            worker = Worker(self.name, self._work, self._wake)
            try:
                worker.start()
            except RuntimeError as error:
                return error
            self._worker = worker
        return None

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _first(self) -> Job | None:
        return next((job for job in self._jobs if job.retry), next(iter(self._jobs), None))

    def _surplus(self) -> Job | None:
        """The oldest job that waits beyond a limit."""
        waiting = [job for job in self._jobs if job is not self._running]
        full = sum(job.size for job in self._jobs) > KEPT_BYTES and sum(job.retry for job in waiting) > 1
        count = Counter(job.part for job in waiting)
        return next((job for job in waiting if (full if job.retry else count[job.part] > WAITING)), None)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            started = time.perf_counter()
            error = self._try(job)
            with self._changed:
                self.seconds += time.perf_counter() - started
                self._running, job.tries = None, job.tries + 1
                if job in self._jobs and not (error is not None and self._tries_again(job, error)):
                    self._jobs.remove(job)
                    if error is not None:
                        self._failures.lost(job.part, job.step)
                    elif job.step is not None:
                        self.last_step = job.step
                self._changed.notify_all()
            del job, error  # with the pictures they hold, until there is something to do again

    def _next(self) -> Job | None:
        """The job to do now; None when the queue is closed and empty, which ends the thread."""
        with self._changed:
            while True:
                job = self._first()
                if is_cancelled() or (job is None and self._closing):
                    self._worker = None
                    self._changed.notify_all()
                    return None
                pause = self._failures.pause(job.part) if job is not None and job.retry and not self._closing else 0.0
                if job is not None and not pause:
                    self._running, self._since = job, time.monotonic()
                    return job
                self._changed.wait(pause or None)

    def _try(self, job: Job) -> BaseException | None:
        if not self._closing and self._failures.pause(job.part):
            return TimeoutError()  # without retries, and the part fails at present
        try:
            job.action()
        except Cancelled as error:  # recorded by `close`
            return error
        except BaseException as error:  # SystemExit too must not end the thread
            self._failures.failed(job.part, error)
            return error
        self._failures.worked(job.part)
        return None

    def _tries_again(self, job: Job, error: BaseException) -> bool:
        if self._closing:  # no time to wait for the next try
            return job.retry and not self._failures.pause(job.part)
        return job.retry and (job.tries < TRIES or (self._persistent and isinstance(error, OSError)))
