"""`History`: earlier snapshots of a run, for film strips, and what takes long to compute of their patches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch

from attn_monitor.attention import PatchColors
from attn_monitor.draw.patch_colors import with_colors
from attn_monitor.measure.dense_quality import dense_metrics
from attn_monitor.measure.patch_features import Layers
from attn_monitor.measurements import Metrics
from attn_monitor.record.thinning import thin
from attn_monitor.snapshot import Same, Snapshot

MAX_SNAPSHOTS = 24


class Entry:
    """A snapshot of the past, which gets its colours and metrics on the thread that first draws or writes it.

    Colours continue those of the entry before, so they are computed in order; nothing else waits for that.

    Args:
        snapshot: the snapshot, with patch tokens or colours.
        before: the entry whose colours are continued; None at the start of a run.
        dense: whether to measure `dense_quality`.
        late: waits for more metrics of the snapshot; None if there are none.
    """

    def __init__(
        self, snapshot: Snapshot, before: Entry | None, *, dense: bool, late: Callable[[], Metrics] | None = None
    ) -> None:
        self.snapshot, self.before, self._dense, self._late = snapshot, before, dense, late
        self._lock = threading.Lock()
        self._reference: Layers | None = None  # what later entries continue
        self._error: Exception | None = None

    @property
    def adds_metrics(self) -> bool:
        """Whether it has metrics that the snapshot lacks."""
        return self._dense or self._late is not None

    def colored(self) -> Snapshot:
        """Return the snapshot with colours, and with metrics of its patch tokens and those that came late.

        Raises:
            Exception: They cannot be computed. Colours are black and metrics absent then, and only the first call
                raises.
        """
        self._settle()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self.snapshot

    @property
    def is_settled(self) -> bool:
        """Whether colours and metrics are known, so that `colored` returns at once."""
        return self._reference is not None

    def _settle(self) -> Layers:
        """Compute the colours unless they are known, and return those that the next entry continues."""
        with self._lock:
            if self._reference is None:
                past: Layers = {} if self.before is None else self.before._settle()
                metrics = self._measured()
                try:
                    layers = with_colors(self.snapshot.layers, past)
                except Exception as error:
                    self._error, layers = error, {}
                    for key, one in self.snapshot.layers.items():
                        if one.patches is not None:
                            black = PatchColors(torch.zeros(*one.patches.shape[:2], 3, device="cpu"), 1.0)
                            one = replace(one, patches=None, patch_colors=black)
                        layers[key] = one
                self.snapshot = replace(self.snapshot, layers=layers, metrics=metrics)
                shown = {key: one for key, one in layers.items() if one.colors is not None and one.colors.any()}
                self._reference, self.before = {**past, **shown}, None  # black is no colour to continue
            return self._reference

    def _measured(self) -> Metrics:
        found = Metrics(self.snapshot.metrics)
        for more in (self._late, partial(dense_metrics, self.snapshot.layers) if self._dense else None):
            try:
                found.update(more() if more is not None else {})
            except Exception as error:
                self._error = error
        return found


class History:
    """Earlier snapshots of the drawn layers in order of steps, thinned evenly to `MAX_SNAPSHOTS`.

    Args:
        snapshots: the past, in order of steps.
        dense: whether to measure `dense_quality`.
    """

    def __init__(self, snapshots: Sequence[Snapshot] = (), *, dense: bool = False) -> None:
        self.entries: list[Entry] = []
        self.dense = dense
        for snapshot in snapshots:
            self.entries.append(self._entry(snapshot, self.entries))

    def __iter__(self) -> Iterator[Snapshot]:
        return iter([entry.snapshot for entry in self.entries])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Snapshot:
        return self.entries[index].snapshot

    def __reduce__(self) -> tuple[partial[History], tuple[list[Snapshot]]]:
        return partial(History, dense=self.dense), (list(self),)

    def _entry(self, snapshot: Snapshot, before: Sequence[Entry], late: Callable[[], Metrics] | None = None) -> Entry:
        return Entry(snapshot, before[-1] if before else None, dense=self.dense, late=late)

    def add(self, snapshot: Snapshot, layers: Sequence[int], *, late: Callable[[], Metrics] | None = None) -> None:
        """Append some layers of a snapshot; drop snapshots of its step and later, from before a run was resumed.

        Args:
            snapshot: the snapshot.
            layers: the layers to keep.
            late: waits for more metrics of the snapshot; None if there are none.
        """
        kept = [entry for entry in self.entries if entry.snapshot.step < snapshot.step]
        kept.append(self._entry(snapshot.only(layers), kept, late))
        if len(kept) > MAX_SNAPSHOTS:
            kept = [kept[i] for i in thin([entry.snapshot.step for entry in kept], MAX_SNAPSHOTS * 3 // 4)]
            for entry, following in pairwise(kept):  # so that nothing holds those that are left out
                following.before = entry
        self.entries = kept

    def colored(self, snapshot: Same) -> Same:
        """Return a snapshot of the history with all its layers, and the colours and metrics of its patches."""
        entry = next((e for e in self.entries if e.snapshot.step == snapshot.step), None) or self._entry(snapshot, ())
        return snapshot.with_colors(entry.colored())
