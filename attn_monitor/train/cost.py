"""`Cost`: measure what watching takes on the training thread, and decide whether another snapshot fits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SHARE = 0.05  # of the loop's time, for snapshots whose distance the user has not given
FREE = 1.0  # seconds of them in all that are taken in any case, as runs of seconds are made to see attention form


@dataclass
class Cost:
    """Measure the seconds that watching takes on the training thread, discovery apart from snapshots."""

    snapshots: int = 0
    discovery: float = 0.0
    blocked: float = 0.0
    postponed: int = 0
    """How often a snapshot was put off as it did not fit."""
    started: float = field(default_factory=time.perf_counter)
    _latest: float = 0.0  # seconds of the latest snapshot
    _loop: tuple[float, float] | None = None  # when the first snapshot ended, and ``blocked`` at that time
    _first: int = 0  # its step

    @contextmanager
    def of_discovery(self) -> Iterator[None]:
        """Count the time of a ``with`` block as discovery."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.discovery += time.perf_counter() - started

    @contextmanager
    def of_a_snapshot(self, step: int = 0) -> Iterator[None]:
        """Count the time of a ``with`` block as a snapshot at this step, without the discovery in it."""
        started, discovery, snapshots = time.perf_counter(), self.discovery, self.snapshots
        try:
            yield
        finally:
            ended = time.perf_counter()
            seconds = ended - started - (self.discovery - discovery)
            self.blocked += seconds
            if self.snapshots > snapshots:
                self._latest = seconds
                if self._loop is None:
                    self._loop, self._first = (ended, self.blocked), step

    def next_check_step(self, step: int, last: int) -> int | None:
        """Return the step to look again at, None if a snapshot fits now.

        It fits if all snapshots after the first of this run would, with one more like the latest, stay within ``SHARE``
        of the loop's time, ``FREE`` seconds aside. Otherwise the step is that at which it will, if steps take as long
        as so far; as they may not, it is at most twice as far from the latest snapshot.

        Args:
            step: optimizer steps done.
            last: step of the latest snapshot.
        """
        if self._loop is None:
            return None
        began, before = self._loop
        passed = time.perf_counter() - began
        missing = max(0.0, self.blocked - before + self._latest - FREE) / SHARE - passed
        if missing <= 0:
            return None
        self.postponed += 1
        wait = math.ceil(missing * max(1, step - self._first) / max(passed, 1e-9))
        return step + max(1, min(wait, step - last))

    def text(self, waited: float, behind: float) -> str:
        """Summarise in one line what watching has cost.

        Args:
            waited: seconds that the run waited at its end.
            behind: seconds spent on background threads.
        """
        wall = time.perf_counter() - self.started - waited
        share = f"{self.blocked / max(wall, 1e-9):.1%} of {wall:.{0 if wall >= 10 else 1}f} s"
        limit = f"{FREE:g} s and {SHARE:.0%} of the loop"
        spread = f", spread to take {limit} beside the first and the last" if self.postponed else ""
        return (
            f"{self.snapshots} snapshots{spread}, {self.blocked:.1f} s on the training thread ({share}) and "
            f"{self.discovery:.1f} s for the first look, {waited:.1f} s waiting at the end, "
            f"{behind:.1f} s behind training"
        )
