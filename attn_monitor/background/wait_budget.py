"""`WaitBudget`: how long the training thread may wait for disks and loggers in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from attn_monitor.workers import Worker

RUN_SECONDS = 60.0  # all waits of a run together
EXCEPTION_SECONDS = 5.0  # of them, once an exception ends the run
DISK_SECONDS = 20.0  # one call on a disk

Result = TypeVar("Result")


class WaitBudget:
    """The seconds that a run may still be held up. Every wait is deducted.

    Args:
        seconds: the budget; None is ``RUN_SECONDS``.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.left = RUN_SECONDS if seconds is None else seconds
        self._for_the_end = self.left / 2

    def limit(self, seconds: float) -> None:
        """Leave no more than this."""
        self.left = min(self.left, seconds)

    @contextmanager
    def spend(self) -> Iterator[float]:
        """Enter a wait: yields its timeout in seconds, and deducts what it took."""
        started = time.monotonic()
        try:
            yield self.left
        finally:
            self.left = max(0.0, self.left - (time.monotonic() - started))

    def call(self, action: Callable[[], Result], late: Callable[[Result], object] = lambda result: None) -> Result:
        """Call a function that may hang, on a thread of its own; on this one where the system starts no thread.

        It gets ``DISK_SECONDS``, and no more than leaves half of the budget for the end of the run.

        Args:
            action: the function, which is cancelled when its time is over.
            late: receives the result if it comes after that.

        Returns:
            The function's result.

        Raises:
            TimeoutError: the result did not come in time. Else whatever the function raises.
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
