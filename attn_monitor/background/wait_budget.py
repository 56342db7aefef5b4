"""`WaitBudget`: limit how long the training thread waits for disks and loggers in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from attn_monitor.workers import Worker

RUN_SECONDS = 60.0  # for all waits of a run together
EXCEPTION_SECONDS = 5.0  # for the rest, once an exception ends the run
DISK_SECONDS = 20.0  # for one call on a disk

Result = TypeVar("Result")


class WaitBudget:
    """Hold the seconds that a run may still wait, ``left``; every wait is deducted.

    Args:
        seconds: the budget; None is ``RUN_SECONDS``.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.left = RUN_SECONDS if seconds is None else seconds
        self._for_the_end = self.left / 2

    def limit(self, seconds: float) -> None:
        """Reduce what is left to at most this many seconds."""
        self.left = min(self.left, seconds)

    @contextmanager
    def spend(self) -> Iterator[float]:
        """Yield the timeout of a wait in seconds, and deduct the time of the ``with`` block."""
        started = time.monotonic()
        try:
            yield self.left
        finally:
            self.left = max(0.0, self.left - (time.monotonic() - started))

    def call(self, action: Callable[[], Result], late: Callable[[Result], object] = lambda result: None) -> Result:
        """Call a function that may hang, on a thread of its own; on this one if the system starts no thread.

        The timeout is ``DISK_SECONDS``, or less so that half of the budget stays for the end of the run.

        Args:
            action: the function, which is cancelled after the timeout.
            late: receives a result that comes after the timeout.

        Returns:
            The function's result.

        Raises:
            TimeoutError: The result did not come in time. Other exceptions are those of the function.
        """
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        worker = Worker("disk", run)
        try:
            worker.start()
        except RuntimeError:
            return action()
        with self.spend() as left:
            seconds = max(0.0, min(DISK_SECONDS, left - self._for_the_end))
            done, _ = wait([future], seconds)
        if done:
            return future.result()
        worker.cancel()
        future.add_done_callback(lambda ended: None if ended.exception() else late(ended.result()))
        raise TimeoutError(f"not done after {seconds:.0f} s")
