"""`Failures`: what people are warned of, each once and not too often, and when to retry what failed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from attn_monitor.errors import text_of

Result = TypeVar("Result")

LONGEST_PAUSE = 120.0  # seconds between two tries of a part that fails
SILENCE = 60.0  # seconds between two warnings about a part, doubled each time


@dataclass
class _Part:
    in_a_row: int = 0  # failures
    due: float = 0.0  # when to try again, in `time.monotonic`
    reported: bool = False  # the present failure
    quiet_until: float = 0.0
    silence: float = SILENCE
    missing: list[int] = field(default_factory=list)  # steps, until they are reported


class Failures:
    """Knows for each part of the monitor, by name, whether it works, when to retry it, and which steps it lacks.

    A part that fails is retried at growing distances, at most ``LONGEST_PAUSE`` apart, for ever. That it failed and
    that it works again is one warning each; where that alternates, at growing distances too. All methods but `report`,
    which warns or raises and is for the training thread, may be called on any thread.

    Args:
        hint: added to each failure.
    """

    def __init__(self, hint: str = "") -> None:
        self._hint = hint
        self._news: deque[tuple[str, Exception | None]] = deque()
        self._parts: dict[str, _Part] = {}
        self._seen: set[Hashable] = set()
        self._lock = threading.RLock()

    def attempt(
        self,
        part: str,
        action: Callable[[], object],
        *,
        raising: type[Exception] | tuple[type[Exception], ...] = (),
        again: bool = True,
    ) -> bool:
        """Call a function; what it raises waits for `report`, except errors of the types ``raising``.

        Returns:
            Whether it succeeded.
        """
        try:
            action()
        except raising:
            raise
        except Exception as error:
            self.failed(part, error, again=again)
            return False
        self.worked(part)
        return True

    def result_of(self, part: str, action: Callable[[], Result]) -> Result | None:
        """The result of a function, which is called once; None where it fails, as in `attempt`."""
        found: list[Result] = []
        self.attempt(part, lambda: found.append(action()), again=False)
        return found[0] if found else None

    def pause(self, part: str) -> float:
        """Seconds until this part is to be retried; 0 when it works or it is time."""
        with self._lock:
            state = self._parts.get(part)
            return 0.0 if state is None or not state.in_a_row else max(0.0, state.due - time.monotonic())

    def fails(self, part: str) -> bool:
        """Whether it failed the last time."""
        return part in self._parts and self._parts[part].in_a_row > 0

    def failed(self, part: str, error: BaseException, *, about: str = "", again: bool = True) -> None:
        """Record a failure: the part is retried at once, then after 1, 2, 4, … seconds; never unless ``again``."""
        with self._lock:
            state, now = self._parts.setdefault(part, _Part()), time.monotonic()
            state.in_a_row += 1
            pause = min(2.0 ** min(state.in_a_row - 2, 30), LONGEST_PAUSE) if state.in_a_row > 1 else 0.0
            state.due = now + pause
            if state.reported or now < state.quiet_until:
                return
            state.reported, state.quiet_until, state.silence = True, now + state.silence, 2 * state.silence
            raised = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
            reason = f"{about}{type(error).__name__}: {text_of(error)}"
            hint = f" ({'will be retried; ' * again}{self._hint})" if self._hint else ""
            self._news.append((f"{part} failed, training goes on. {reason}{hint}", raised))

    def worked(self, part: str) -> None:
        """Record a success, reported where the failure was."""
        with self._lock:
            state = self._parts.get(part)
            if state is None or not state.in_a_row:
                return
            state.in_a_row = 0
            if state.reported:
                steps = f"missing: {in_words(state.missing)}" if state.missing else "nothing is missing"
                self._news.append((f"{part} works again; {steps}", None))
                state.reported, state.missing = False, []

    def lost(self, part: str, step: int | None, error: Exception | None = None) -> None:
        """Record a step that this part will lack; ``error`` says why, unless the part is known to fail."""
        with self._lock:
            state = self._parts.setdefault(part, _Part())
            if step is not None:
                state.missing.append(step)
            if error is not None and not state.in_a_row:
                self.failed(part, error)

    def is_new(self, key: Hashable) -> bool:
        """Whether this is the first time that something is reported; true once for each key."""
        with self._lock:
            new = key not in self._seen
            self._seen.add(key)
            return new

    def note(self, text: str) -> None:
        """Warn of something that is no failure of the monitor."""
        self._news.append((text, None))

    def sum_up(self) -> None:
        """At the end of a run, report which steps are missing and were not reported yet."""
        with self._lock:
            missing = {part: state.missing for part, state in self._parts.items() if state.missing}
            for part in missing:
                self._parts[part].missing = []
        if missing:
            lines = "".join(f"\n  {part}: {in_words(steps)}" for part, steps in missing.items())
            self.note(f"the run has ended, and this was not done:{lines}")

    def report(self, warn: Callable[[str], None], *, reraise: bool = False) -> None:
        """Warn of what happened since the last report, or raise the first failure of it."""
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
