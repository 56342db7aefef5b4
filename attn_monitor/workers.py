"""Threads of this package: work on them can be given up between two images or files, and has ended when Python does."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable

AT_EXIT = 5.0  # seconds that the end of Python waits for all of them together


class GivenUp(BaseException):
    """The work on this thread has been given up. No `Exception`, so that nothing on the way goes on without it."""


class Worker(threading.Thread):
    """A daemon thread whose work can be given up; ``wake`` is called then, for where it waits for something to do."""

    def __init__(self, name: str, run: Callable[[], object], wake: Callable[[], object] = lambda: None) -> None:
        super().__init__(name=f"attn_monitor {name}", target=run, daemon=True)
        self.given_up = False
        self._wake = wake

    def give_up(self) -> None:
        """Leave the work at its next `safe_point`."""
        self.given_up = True
        self._wake()


def is_given_up() -> bool:
    """Whether this thread is a `Worker` that is to end."""
    return isinstance(thread := threading.current_thread(), Worker) and thread.given_up


def safe_point() -> None:
    """Stands between two images, files or steps: leaves by `GivenUp` if the work on this thread has been given up."""
    if is_given_up():
        raise GivenUp


@atexit.register
def _end_all() -> None:
    """End the threads before Python does.

    Python ends a daemon thread where it next asks for the GIL. In C++ code, such as PyTorch's, that aborts the process.
    One that waits for a disk or in somebody's logger holds up the exit no longer than ``AT_EXIT``.
    """
    workers = [thread for thread in threading.enumerate() if isinstance(thread, Worker)]
    for worker in workers:
        worker.give_up()
    until = time.monotonic() + AT_EXIT
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
