"""`PicturePlan`: decide at which snapshots pictures are logged, as loggers keep all that they get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from attn_monitor.trackers.events import Event, Masks, Picture

KEEP = 100  # snapshots with pictures in a run
WIDER = 1.5  # factor between the steps at which pictures of the run so far are drawn


class PicturePlan:
    """Thin out pictures in order of snapshots; the last ones, held back, are logged at the end.

    Pictures of one step are kept of at most ``keep`` snapshots, evenly spread. Where the number of snapshots is not
    known, the distance doubles whenever that many were kept. Pictures of the run so far (`Picture.so_far`) repeat what
    the ones before them show, so the step grows by half from one to the next.

    Args:
        keep: how many snapshots get pictures, at least 1; None is all.
        expected: how many snapshots the run takes at most, None if it is unknown.

    Example:
        >>> plan, event = PicturePlan(keep=2, expected=4), Picture("attn_maps/cat", lambda: None)
        >>> [len(plan.take([event], step)) for step in (0, 10, 20, 30)]
        [1, 0, 1, 0]
        >>> plan.rest() == [event]
        True
    """

    def __init__(self, keep: int | None = KEEP, expected: float | None = None) -> None:
        self._keep = math.inf if keep is None else keep
        self._every = 1 if expected is None else max(1, math.ceil(expected / self._keep))
        self._known = expected is not None
        self._snapshots = self._kept = 0
        self._so_far: int | None = None  # step of the latest pictures of the run so far
        self._held: list[Event[Any]] = []

    def take(self, events: Sequence[Event[Any]], step: int) -> list[Event[Any]]:
        """Return those of a snapshot's events that are logged now."""
        now = self._snapshots % self._every == 0
        so_far = self._so_far is None or step >= WIDER * self._so_far
        self._snapshots, self._kept = self._snapshots + 1, self._kept + now
        if not self._known and self._kept >= self._keep:
            self._every, self._kept = 2 * self._every, 0
        if so_far:
            self._so_far = step
        taken = [event for event in events if _is_due(event, now, so_far)]
        self._held = [event for event in events if event not in taken]
        return taken

    def rest(self) -> list[Event[Any]]:
        """Return what was held back of the last snapshot."""
        held, self._held = self._held, []
        return held


def _is_due(event: Event[Any], now: bool, so_far: bool) -> bool:
    if isinstance(event, Picture) and event.so_far:
        return so_far
    return now or not isinstance(event, (Picture, Masks))
