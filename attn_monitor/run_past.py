"""`RunPast`: what a monitor remembers of its run: snapshots, curves, health flags, and what the verdict is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attn_monitor.attention import LayerAttention
from attn_monitor.draw.history import History
from attn_monitor.measure.health import Health, HealthLimits
from attn_monitor.measure.run_history import RunHistory
from attn_monitor.measure.verdict import judge
from attn_monitor.measurements import Metrics, Verdict
from attn_monitor.record.curves import Curves
from attn_monitor.record.snapshot_file import snapshot_from_state, snapshot_state
from attn_monitor.snapshot import Snapshot


class RunPast:
    """Remember the snapshots of a run, for those to come.

    Args:
        limits: when a health flag is raised.
        dense: whether to measure `dense_quality`.
        gram_step: the first snapshot from this step on is the reference of Gram drift; None for none.
    """

    def __init__(self, limits: HealthLimits, *, dense: bool, gram_step: int | None) -> None:
        self._limits, self._dense, self._gram_step = limits, dense, gram_step
        self.clear()

    def clear(self) -> None:
        """Forget everything, so that the next snapshot is the first of a run."""
        self.previous: Snapshot | None = None
        self.reference: Snapshot | None = None  # of Gram drift
        self.history, self.curves = History(dense=self._dense), Curves()
        self.progress = RunHistory()  # what the verdict is made of
        self.health = Health(self._limits)

    def add(self, snapshot: Snapshot, layers: Sequence[int], late: Callable[[], Metrics] | None = None) -> None:
        """Make a snapshot the latest one.

        Args:
            snapshot: the snapshot.
            layers: the layers that are drawn.
            late: waits for more metrics of the snapshot; None if there are none.
        """
        self.previous = snapshot
        if self.reference is not None and snapshot.step <= self.reference.step:
            self.reference = None  # it is from before the run was resumed
        stored = [a.features for a in snapshot.layers.values() if a.features is not None]
        whole = bool(stored) and all(bool(features.isfinite().all()) for features in stored)
        if self._gram_step is not None and self.reference is None and whole and snapshot.step >= self._gram_step:
            self.reference = snapshot
        self.health.add(snapshot.flags)
        self.history.add(snapshot, layers, late=late)
        self.curves.add(snapshot.step, snapshot.metrics)
        self.progress.add(snapshot.step, snapshot.metrics)

    def judge(self, step: int, metrics: Metrics) -> Verdict | None:
        """Judge the run up to a snapshot of these metrics, with what other threads have computed of earlier ones."""
        self.progress.add(step, metrics)
        for entry in self.history.entries:
            if entry.is_settled and entry.snapshot.step < step:
                self.progress.complete(entry.snapshot.step, entry.snapshot.metrics)
        return judge(self.progress) if self._limits.verdict else None

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, see `AttentionMonitor.state_dict`."""
        return {
            "previous": _state(self.previous),
            "reference": _state(self.reference),
            "history": [snapshot_state(s, patches=True) for s in self.history],
            "health": self.health.state_dict(),
            "curves": self.curves.state_dict(),
            "progress": self.progress.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.previous, self.reference = _snapshot(state["previous"]), _snapshot(state["reference"])
        self.history = History([snapshot_from_state(s) for s in state["history"]], dense=self._dense)
        self.health.load_state_dict(state["health"])
        self.curves = Curves.from_state_dict(state["curves"])
        self.progress = RunHistory.from_state_dict(state.get("progress", []))


def layers_before(snapshot: Snapshot | None, step: int) -> Mapping[tuple[str, int], LayerAttention] | None:
    """Return the layers of a snapshot if it is of an earlier step, else None."""
    return snapshot.layers if snapshot is not None and snapshot.step < step else None


def _state(snapshot: Snapshot | None) -> dict[str, Any] | None:
    return None if snapshot is None else snapshot_state(snapshot)


def _snapshot(state: dict[str, Any] | None) -> Snapshot | None:
    return None if state is None else snapshot_from_state(state)
