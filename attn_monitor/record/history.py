"""`History`: earlier snapshots of a run, for film strips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from attn_monitor.snapshot import Snapshot

MAX_SNAPSHOTS = 24


class History:
    """Earlier snapshots of the drawn layers in order of steps, thinned evenly to `MAX_SNAPSHOTS`."""

    def __init__(self, snapshots: Sequence[Snapshot] = ()) -> None:
        self._snapshots = list(snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    def __len__(self) -> int:
        return len(self._snapshots)

    def __getitem__(self, index: int) -> Snapshot:
        return self._snapshots[index]

    def add(self, snapshot: Snapshot, layers: Sequence[int]) -> None:
        """Append some layers of a snapshot; drop snapshots of its step and later, from before a run was resumed."""
        kept = [s for s in self._snapshots if s.step < snapshot.step]
        self._snapshots = [*kept, snapshot.only(layers)]
        if len(self._snapshots) > MAX_SNAPSHOTS:
            chosen = thin([s.step for s in self._snapshots], MAX_SNAPSHOTS * 3 // 4)
            self._snapshots = [self._snapshots[i] for i in chosen]

    def clear(self) -> None:
        """Remove all snapshots."""
        self._snapshots = []


def thin(steps: Sequence[int], count: int) -> list[int]:
    """Choose at most ``count`` indices of ascending ``steps``, spread evenly, with the first and the last.

    Example:
        >>> thin([0, 1, 2, 50, 100], 3)
        [0, 3, 4]
    """
    if len(steps) <= count:
        return list(range(len(steps)))
    goals = np.linspace(steps[0], steps[-1], count)
    return sorted({int(np.abs(np.asarray(steps) - goal).argmin()) for goal in goals})
