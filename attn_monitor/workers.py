"""Threads that can be cancelled between two images or files, and that end before Python does."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable

AT_EXIT = 5.0  # seconds that Python's exit waits for all of them together


class Cancelled(BaseException):
    """The work of this thread is cancelled. It is no `Exception`, so that no handler on the way continues the work."""


class Worker(threading.Thread):
    """A daemon thread that can be cancelled.

    Args:
        name: Name of the thread.
        run: Work of the thread.
        wake: Called on cancellation, to end a wait for work.
    """

    def __init__(self, name: str, run: Callable[[], object], wake: Callable[[], object] = lambda: None) -> None:
        super().__init__(name=f"attn_monitor {name}", target=run, daemon=True)
        self.cancelled = False
        self._wake = wake

    def cancel(self) -> None:
        """Let the work end at its next `safe_point`."""
        self.cancelled = True
        self._wake()


def is_cancelled() -> bool:
    """Return True if the current thread is a cancelled `Worker`."""
    return isinstance(thread := threading.current_thread(), Worker) and thread.cancelled


def safe_point() -> None:
    """Raise `Cancelled` if the current thread is cancelled; call it between two images, files or steps."""
    if is_cancelled():
        raise Cancelled


@atexit.register
def _end_all() -> None:
    """Cancel and join the threads at exit.

    Python ends a daemon thread as it next takes the GIL; within C++ code, such as PyTorch's, that aborts the process. A
    thread that waits for a disk or a logger delays the exit by at most `AT_EXIT`.
    """
    workers = [thread for thread in threading.enumerate() if isinstance(thread, Worker)]
    for worker in workers:
        worker.cancel()
    until = time.monotonic() + AT_EXIT
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
