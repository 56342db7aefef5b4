"""`JobQueue`: do the jobs of one destination in order, on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from attn_monitor.background.failures import Failures
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.workers import Cancelled, Worker, is_cancelled

KEPT_BYTES = 64 * 2**20  # limit for the waiting jobs with retries of one destination
WAITING = 32  # limit for the waiting jobs without retries of one part
TRIES = 10  # limit for a job with retries
UNANSWERED = 60.0  # seconds after which a destination counts as failing


@dataclass(eq=False)
class Job:
    """Hold something to do at a destination.

    Args:
        part: its name in `Failures`.
        step: training step that it belongs to; None is the run as a whole.
        action: does the job, and raises an exception if that fails.
        size: bytes of memory that the job holds.
        retry: whether a failed job is retried.
        tries: how often it has been tried so far.
    """

    part: str
    step: int | None
    action: Callable[[], object]
    size: int = 0
    retry: bool = True
    tries: int = 0


class JobQueue:
    """Do the jobs of one destination one after another, so that one that hangs holds up nothing else.

    Jobs with retries come first, so that metrics do not wait for pictures. `put` never waits: beyond ``KEPT_BYTES`` of
    jobs with retries, and ``WAITING`` jobs of a part without, the oldest are dropped. ``seconds`` is the time spent on
    jobs so far, ``last_step`` the step of the latest finished job.

    Args:
        name: the destination's name in messages.
        failures: records what fails, and decides when to retry.
        budget: how long `close` may wait.
        persistent: whether to retry after an OSError for as long as the run lasts, not ``TRIES`` times.
    """

    def __init__(self, name: str, failures: Failures, budget: WaitBudget, *, persistent: bool = False) -> None:
        self.name, self.seconds = name, 0.0
        self.last_step: int | None = None
        self._failures, self._budget, self._persistent = failures, budget, persistent
        self._jobs: list[Job] = []  # including the one that runs
        self._running: Job | None = None
        self._since = 0.0  # start of the running job, in `time.monotonic`
        self._changed = threading.Condition()
        self._worker: Worker | None = None
        self._closing = False

    def put(self, job: Job) -> None:
        """Queue a job without waiting, and drop the oldest beyond the limits."""
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
        """Wait until all jobs are done; False if that takes too long, or the next job is failing."""

        def failing() -> bool:
            return (job := self._first()) is not None and self._failures.pause(job.part) > 0

        with self._changed, budget.spend() as seconds:
            self._changed.wait_for(lambda: not self._jobs or failing(), seconds)
            return not self._jobs

    def close(self) -> None:
        """Try the remaining jobs once more, end the thread, and record what was not done.

        A thread that takes too long is cancelled, which ends it at its next `safe_point`.
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
        """Start the thread if there are jobs and it does not run; return the error if the system starts none."""
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
        """Return the oldest waiting job of a kind beyond its limit, None if no limit is exceeded."""
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
            del job, error  # free the pictures they hold before waiting

    def _next(self) -> Job | None:
        """Wait for the next job to do; None, which ends the thread, if the queue is closed and empty."""
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
            return TimeoutError()  # a job without retries is skipped while its part fails
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
