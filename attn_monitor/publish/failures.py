"""The account of what failed: which part of the monitor works, when to try it again, and what has been told of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from attn_monitor.errors import text_of
from attn_monitor.workers import safe_point

Result = TypeVar("Result")

LONGEST_PAUSE = 120.0  # seconds between two tries of a part that fails
SILENCE = 60.0  # seconds after news of a part before the next; doubles each time


class Paused(Exception):  # noqa: N818 - a state rather than an error
    """A part waits for something that is told elsewhere: a failure without words of its own."""


@dataclass
class _Part:
    in_a_row: int = 0
    due: float = 0.0  # when to try again, in `time.monotonic`
    told: bool = False  # of the present failure
    paused: bool = False  # it is told elsewhere
    quiet_until: float = 0.0
    silence: float = SILENCE
    missing: list[int] = field(default_factory=list)  # steps, until they have been told


class Failures:
    """Knows for each part of the monitor whether it works, when to try again, and what of it has been told.

    A part that fails is tried again at growing distances, at most ``LONGEST_PAUSE`` apart, for ever. That it failed
    and that it works again is told once each; of a part that goes on and off, at growing distances too. All methods
    but `report`, which warns or raises and is for the training thread, may be called on any. ``hint`` is said with
    each failure.
    """

    def __init__(self, hint: str = "") -> None:
        self._hint = f" ({hint})" if hint else ""
        self._news: deque[tuple[str, Exception | None]] = deque()
        self._parts: dict[str, _Part] = {}
        self._lock = threading.RLock()

    def attempt(
        self, part: str, action: Callable[[], object], *, raising: type[Exception] | tuple[type[Exception], ...] = ()
    ) -> bool:
        """Do it; what it raises waits for `report`, except errors of the types ``raising``. Whether it was done."""
        try:
            action()
        except raising:
            raise
        except Exception as error:
            self.failed(part, error)
            return False
        self.worked(part)
        return True

    def result_of(self, part: str, action: Callable[[], Result]) -> Result | None:
        """What it returns; None where it fails, as in `attempt`."""
        found: list[Result] = []
        self.attempt(part, lambda: found.append(action()))
        return found[0] if found else None

    def each(self, some: str, actions: Mapping[str, Callable[[], object]], step: int) -> None:
        """Do all of them, of which one that fails keeps none back: part ``some``. Raises if all failed."""
        errors: dict[str, Exception] = {}
        for name, action in actions.items():
            safe_point()
            try:
                action()
            except Exception as error:
                errors[name] = error
        if errors and len(errors) == len(actions):
            raise next(iter(errors.values()))
        if errors:
            self.failed(some, next(iter(errors.values())), about=", ".join(errors) + ": ")
            self.lost(some, step)
        else:
            self.worked(some)

    def pause(self, part: str) -> float:
        """Seconds until this part is to be tried again; 0 when it works or it is time."""
        with self._lock:
            state = self._parts.get(part)
            return 0.0 if state is None or not state.in_a_row else max(0.0, state.due - time.monotonic())

    def fails(self, part: str) -> bool:
        """Whether it did not work the last time."""
        return part in self._parts and self._parts[part].in_a_row > 0

    def failed(self, part: str, error: BaseException, *, about: str = "") -> None:
        """It did not work: the next time at once, then after 1, 2, 4, … seconds."""
        with self._lock:
            state, now = self._parts.setdefault(part, _Part()), time.monotonic()
            state.in_a_row += 1
            pause = min(2.0 ** min(state.in_a_row - 2, 30), LONGEST_PAUSE) if state.in_a_row > 1 else 0.0
            state.due = now + pause
            if isinstance(error, Paused):
                state.paused = True
            if state.told or state.paused or now < state.quiet_until:
                return
            state.told, state.quiet_until, state.silence = True, now + state.silence, 2 * state.silence
            raised = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
            reason = f"{about}{type(error).__name__}: {text_of(error)}"
            self._news.append((f"{part} failed, training goes on. {reason}{self._hint}", raised))

    def worked(self, part: str) -> None:
        """It worked: told where its failure was."""
        with self._lock:
            state = self._parts.get(part)
            if state is None or not state.in_a_row:
                return
            state.in_a_row = 0
            if state.told or (state.paused and state.missing):
                steps = f"missing: {in_words(state.missing)}" if state.missing else "nothing is missing"
                self._news.append((f"{part} works again; {steps}", None))
                state.told, state.missing = False, []
            state.paused = False

    def lost(self, part: str, step: int | None, error: Exception | None = None) -> None:
        """Remember a step that this part goes without; ``error`` says why, unless the part is known to fail."""
        with self._lock:
            state = self._parts.setdefault(part, _Part())
            if step is not None:
                state.missing.append(step)
            if error is not None and not state.in_a_row:
                self.failed(part, error)

    def note(self, text: str) -> None:
        """Something to warn of that is no failure of the monitor."""
        self._news.append((text, None))

    def sum_up(self) -> None:
        """At the end of a run, tell what is missing and has not been told."""
        with self._lock:
            missing = {part: state.missing for part, state in self._parts.items() if state.missing}
            for part in missing:
                self._parts[part].missing = []
        if missing:
            lines = "".join(f"\n  {part}: {in_words(steps)}" for part, steps in missing.items())
            self.note(f"the run has ended, and this was not done:{lines}")

    def report(self, warn: Callable[[str], None], *, reraise: bool = False) -> None:
        """Warn of what happened since the last report, or raise the first of it."""
        while self._news:
            message, error = self._news.popleft()
            if reraise and error is not None:
                raise error
            warn(message)


def in_words(steps: Sequence[int]) -> str:
    """Steps for people: "steps 3, 4", and of very many the first and the last."""
    few = sorted(set(steps))
    listed = [*map(str, few)] if len(few) <= 12 else [*map(str, few[:8]), "…", *map(str, few[-2:])]
    return f"step{'s' * (len(few) > 1)} {', '.join(listed)}" + (f" ({len(few)} in all)" if len(few) > 12 else "")
