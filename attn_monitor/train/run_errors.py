"""`RunErrors`: what an exception does to a run; `WatchedRoles`: which roles fail while others are recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

from torch import nn

from attn_monitor.background.failures import Failures
from attn_monitor.capture.observe.isolation import reporting
from attn_monitor.errors import AttentionError, NoAttentionError, ProbeError, TargetError
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.snapshot import Snapshot
from attn_monitor.train.reports import named

SNAPSHOT = "taking a snapshot"  # the part's name in `Failures`
HINT = 'on_error="raise" shows the traceback'  # ends the warning of each failure
USER_ERRORS: tuple[type[Exception], ...] = (AttentionError, ProbeError, TargetError)  # that the user can fix


class Stage(Enum):
    """How far a run is."""

    STARTING = "before the first step: an error that the user can fix ends the run, or the watching of it"
    TRAINING = "the first step has begun: no error ends the run"
    WATCHING = "a first snapshot was taken: models that are not found are a failure as any other"
    UNWATCHED = "attention is not watched in this run, or not any more"


class RunErrors:
    """Turn exceptions into warnings, or let them end the run or the watching of it.

    Args:
        warn: shows a warning on rank zero.
        strict: whether errors that the user can fix end the run before its first step.
        raises: whether each report raises the first failure.
        watched: whether attention is watched in this process.
    """

    def __init__(self, warn: Callable[[str], None], *, strict: bool, raises: bool, watched: bool) -> None:
        self.failures = Failures(HINT)
        self.stage = Stage.STARTING if watched else Stage.UNWATCHED
        self._warn, self.strict, self._raises = warn, strict or raises, raises
        self._searches = 2  # for models; those that are not found may be built in the first step
        self._missed = False  # whether the latest search found none, and another one follows

    @property
    def active(self) -> bool:
        """Whether attention is watched in this run."""
        return self.stage is not Stage.UNWATCHED

    def enter(self, stage: Stage) -> None:
        """Go on to another stage; an unwatched run stays so."""
        if self.active:
            self.stage = stage

    def begin_step(self) -> None:
        """Go on from the start, if the run is there."""
        if self.stage is Stage.STARTING:
            self.stage = Stage.TRAINING

    def attempt(self, part: str, action: Callable[[], object]) -> bool:
        """Call ``action`` as a part of `Failures`, and return whether it succeeded.

        Before the first step, an error that the user can fix ends the run if ``strict``, else only its watching. Models
        that are not found may be built in the first step, so they are searched once more after it.
        """
        raising = {Stage.STARTING: USER_ERRORS, Stage.TRAINING: () if self.strict else (NoAttentionError,)}
        self._missed = False
        try:
            with reporting(self.failures.note):
                return self.failures.attempt(part, action, raising=raising.get(self.stage, ()))
        except USER_ERRORS as error:
            if self.strict:
                raise
            self._missed = self._searches > 1 and isinstance(error, NoAttentionError)
            if not self._missed:
                if self.active:
                    self._warn(f"attention is not watched in this run. {str(error).rstrip('.')}")
                self.stage = Stage.UNWATCHED
            return False

    def searches_again(self) -> bool:
        """Whether the latest attempt found no model for the first time, so that the next batch tries once more."""
        self._searches -= self._missed
        return self._missed

    def report(self, *, reraise: bool = True) -> None:
        """Warn of failures since the last report; with ``on_error="raise"`` raise the first."""
        self.failures.report(self._warn, reraise=reraise and self._raises)


class WatchedRoles:
    """Follow the roles of one run."""

    def __init__(self, failures: Failures, inform: Callable[[str], None]) -> None:
        self._failures, self._inform = failures, inform
        self._seen: set[str] = set()  # roles that have been watched so far
        self._failing: set[str] = set()  # roles that failed in the latest snapshot

    def paused(self) -> tuple[str, ...]:
        """Return the failing roles that are not to be tried yet."""
        return tuple(role for role in self._failing if self._failures.pause(_part_of(role)) > 0)

    def failed(self, errors: Mapping[str, Exception]) -> None:
        """Record the roles that failed while others were recorded."""
        for role, error in errors.items():
            self._failing.add(role)
            self._failures.failed(_part_of(role), error)

    def took(
        self,
        snapshot: Snapshot,
        monitor: AttentionMonitor,
        models: Mapping[str, nn.Module],
        paths: Mapping[str, str],
    ) -> None:
        """Report roles that failed, work again, or are watched for the first time, and layers that are left out."""
        self.failed(monitor.failed)
        for role in self._failing & models.keys():
            if role in snapshot.roles:
                self._failures.worked(_part_of(role))
            else:
                self._failures.lost(_part_of(role), snapshot.step)
        self._failing -= set(snapshot.roles)
        for text in filter(self._failures.is_new, monitor.left_out()):
            self._failures.note(text)
        if new := sorted(set(snapshot.roles) - self._seen) if self._seen else []:
            self._inform(f"watched from step {snapshot.step} on: {', '.join(named(role, paths) for role in new)}")
        self._seen |= set(snapshot.roles)


def _part_of(role: str) -> str:
    return f"{SNAPSHOT} of {role}"
