"""`EmaReports`: report what is wrong with how a teacher follows its student, as soon as it is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from attn_monitor.background.failures import Failures
from attn_monitor.measure.health import HealthLimits
from attn_monitor.measurements import HealthFlag
from attn_monitor.train.ema_watch import EmaWatch

WIRING = "looking at how student and teacher are wired"  # the part's name in `Failures`


class EmaReports:
    """Watch student and teacher of one run on rank zero; after a failure, again from the next snapshot on.

    ``found`` takes flags, and the step, as soon as they are found.
    """

    def __init__(
        self, limits: HealthLimits, failures: Failures, found: Callable[[Sequence[HealthFlag], int], None]
    ) -> None:
        self._limits, self._failures, self._found = limits, failures, found
        self.watch: EmaWatch | None = None

    def begin(self, models: Mapping[str, nn.Module], root: nn.Module | None, step: int) -> None:
        """Begin to watch at a snapshot of these models, within the module ``root``."""

        def begin() -> None:
            if self.watch is None or self.watch.models != models:
                self.stop()
                self.watch = EmaWatch(models, root, self._limits)
            self._found(self.watch.watch(step), step)

        self._try(begin)

    def look(self, look: Callable[[EmaWatch], Sequence[HealthFlag]], step: int) -> None:
        """Report what ``look`` finds at a step, if anything is watched."""
        if (watch := self.watch) is not None:
            self._try(lambda: self._found(look(watch), step))

    def stop(self) -> None:
        """Remove all hooks."""
        if self.watch is not None:
            self.watch.stop()
        self.watch = None

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._failures.failed(WIRING, error)
            self.stop()
