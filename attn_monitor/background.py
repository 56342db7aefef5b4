"""A thread that draws and writes behind the training loop, and the account of what failed there."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

QUEUE_SIZE = 4
PATIENCE = 60.0  # seconds that training waits for a slow sink before it goes on without
MAX_FAILURES = 3  # in a row and of one kind, after which a part is switched off


class BackgroundWriter:
    """Runs jobs one after another on a thread of its own, so that training does not wait for them.

    The queue is bounded: when a sink is slow, `submit` waits up to ``PATIENCE`` seconds and then refuses the job.
    ``seconds`` is the time spent on jobs so far.
    """

    def __init__(self, size: int = QUEUE_SIZE) -> None:
        self.seconds = 0.0
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> bool:
        """Queue a job that raises nothing; False when there was no room for too long."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="attn_monitor-writer", daemon=True)
            self._thread.start()
        try:
            self._jobs.put(job, timeout=PATIENCE)
        except queue.Full:
            return False
        return True

    def drain(self, patience: float | None = None) -> bool:
        """Wait until everything submitted is done; False when that takes more than ``patience`` seconds."""
        deadline = None if patience is None else time.monotonic() + patience
        with self._jobs.all_tasks_done:
            while self._jobs.unfinished_tasks:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._jobs.all_tasks_done.wait(left)
        return True

    def close(self) -> None:
        """End the thread once its work is done; one that hangs in a sink is left behind as a daemon."""
        if self._thread is not None and self.drain(PATIENCE):
            self._jobs.put(None)
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            started = time.perf_counter()
            job()
            self.seconds += time.perf_counter() - started
            self._jobs.task_done()
        self._jobs.task_done()


class Failures:
    """Counts failures in a row for each part of the monitor, tells of them once, and switches a part off after three.

    `attempt` may run on any thread; `report`, on the training thread, warns or raises. ``hint`` says what to do about
    a part that is switched off.
    """

    def __init__(self, hint: str = "") -> None:
        self._hint = f"; {hint}" if hint else ""
        self._news: queue.SimpleQueue[tuple[str, Exception | None]] = queue.SimpleQueue()
        self._in_a_row: dict[str, tuple[type[Exception], int]] = {}

    def attempt(self, part: str, action: Callable[[], object], *, let: type[Exception] | tuple[()] = ()) -> bool:
        """Do it, unless this part is switched off; what it raises waits for `report`. True when it was done.

        Errors of the type ``let`` are let through.
        """
        if self.is_off(part):
            return False
        try:
            action()
        except let:
            raise
        except Exception as error:
            self._failed(part, error)
            return False
        self._in_a_row.pop(part, None)
        return True

    def note(self, text: str) -> None:
        """Something to warn of that is no failure of the monitor."""
        self._news.put((text, None))

    def is_off(self, part: str) -> bool:
        """Whether a part has failed too often to be tried again."""
        return self._in_a_row.get(part, (Exception, 0))[1] >= MAX_FAILURES

    def _failed(self, part: str, error: Exception) -> None:
        kind, count = self._in_a_row.get(part, (type(error), 0))
        count = count + 1 if kind is type(error) else 1
        self._in_a_row[part] = (type(error), count)
        reason = f"{type(error).__name__}: {error}"
        if count == 1:
            self._news.put((f"{part} failed, training goes on. {reason}", error))
        elif count == MAX_FAILURES:
            self._news.put((f"{part} is switched off after {count} failures in a row{self._hint}. {reason}", error))

    def report(self, warn: Callable[[str], None], *, reraise: bool = False) -> None:
        """Warn of what happened since the last report, or raise the first of it."""
        while not self._news.empty():
            message, error = self._news.get()
            if reraise and error is not None:
                raise error
            warn(message)
