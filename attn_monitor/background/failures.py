"""`Failures`: rate-limited warnings, each once, and when to retry a part that failed."""

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
SILENCE = 60.0  # seconds between two warnings about a part, which double each time


@dataclass
class _Part:
    in_a_row: int = 0  # failures since the last success
    due: float = 0.0  # when to try again, in `time.monotonic`
    reported: bool = False  # whether the present failure was
    quiet_until: float = 0.0
    silence: float = SILENCE
    missing: list[int] = field(default_factory=list)  # steps that were not reported yet


class Failures:
    """Track for each part of the monitor, by name, whether it works, when to retry it, and which steps it lacks.

    A part that fails is retried for ever, at growing intervals of at most ``LONGEST_PAUSE``. A failure and the recovery
    from it are one warning each; if they alternate, warnings come at growing intervals too. Call `report`, which warns
    or raises, on the training thread; all other methods may be called on any thread.

    Args:
        hint: added to the warning of each failure.
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
        """Call a function, and keep its exception for `report`.

        Args:
            part: the name under which a failure is recorded.
            action: the function.
            raising: types of exceptions to raise at once instead.
            again: whether the warning says that the part will be retried.

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
        """Call a function once, and return its result; None if it fails, as in `attempt`."""
        found: list[Result] = []
        self.attempt(part, lambda: found.append(action()), again=False)
        return found[0] if found else None

    def pause(self, part: str) -> float:
        """Return the seconds until this part is to be retried; 0 if it works, or the time has come."""
        with self._lock:
            state = self._parts.get(part)
            return 0.0 if state is None or not state.in_a_row else max(0.0, state.due - time.monotonic())

    def fails(self, part: str) -> bool:
        """Whether this part failed the last time."""
        return part in self._parts and self._parts[part].in_a_row > 0

    def failed(self, part: str, error: BaseException, *, about: str = "", again: bool = True) -> None:
        """Record a failure; the part is to be retried at once, then after 1, 2, 4, … seconds.

        Args:
            part: what failed.
            error: its exception.
            about: text before the exception in the warning.
            again: whether the warning says that the part will be retried.
        """
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
        """Record a success, which is reported if the failure was."""
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
        """Record a step that this part lacks; ``error`` is the reason, unless the part fails already."""
        with self._lock:
            state = self._parts.setdefault(part, _Part())
            if step is not None:
                state.missing.append(step)
            if error is not None and not state.in_a_row:
                self.failed(part, error)

    def is_new(self, key: Hashable) -> bool:
        """Whether a key is new; True once for each key."""
        with self._lock:
            new = key not in self._seen
            self._seen.add(key)
            return new

    def note(self, text: str) -> None:
        """Queue a warning that is no failure of the monitor."""
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
        """Warn of everything since the last report; with ``reraise``, raise the first failure instead."""
        while self._news:
            message, error = self._news.popleft()
            if reraise and error is not None:
                raise error
            warn(message)


def in_words(steps: Sequence[int]) -> str:
    """List steps in words, such as "steps 3, 4"; a long list is cut in the middle."""
    few = sorted(set(steps))
    listed = [*map(str, few)] if len(few) <= 12 else [*map(str, few[:8]), "…", *map(str, few[-2:])]
    return f"step{'s' * (len(few) > 1)} {', '.join(listed)}" + (f" ({len(few)} in all)" if len(few) > 12 else "")
