"""The archive that `backfill` adds to: for one process alone, of one probe, one model and one choice of settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from attn_monitor.commands.support.results import writing_to
from attn_monitor.errors import ArchiveError
from attn_monitor.measure.metrics import LARGEST, Measured
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.archive import load_step, snapshot_paths
from attn_monitor.record.atomic_file import remove_unfinished
from attn_monitor.record.folder_claim import Claim, claim_to_fill, owner
from attn_monitor.snapshot import Snapshot

SETTINGS = "backfill.json"  # of the first backfill into an archive
RESTORED = ("entropy", "student_teacher_divergence", *LARGEST)  # what health flags follow over several snapshots

Notify = Callable[[str], None]


class ArchiveToFill:
    """The snapshots of an archive by step, and the checks that new ones have to pass."""

    def __init__(self, claim: Claim, settings: Mapping[str, Any], notify: Notify) -> None:
        self.folder, self.run = claim.folder, claim.run
        self.snapshots: dict[int, Path] = {}
        self._settings = json.loads(json.dumps(settings))  # a tuple is a list there
        self._first: Snapshot | None = None
        for path in snapshot_paths(self.folder):
            try:
                snapshot = load_step(path)
            except (ArchiveError, OSError) as error:
                notify(f"not counted, as it cannot be read: {error}")
            else:
                self.snapshots[snapshot.step] = path
                self._first = self._first or snapshot
        self._check_settings(notify)

    def check(self, snapshot: Snapshot) -> None:
        """Raise `ArchiveError` where a new snapshot is of other roles, layers, heads, grids or queries."""
        self._first = self._first or snapshot
        facts = [_facts(self._first), _facts(snapshot)]
        if facts[0] != facts[1]:
            old, new = ("; ".join(f"{layer}: {fact}" for layer, fact in f.items()) for f in facts)
            raise ArchiveError(f"{self.folder}: holds {old}; this would add {new}. Pass another folder as --out")

    def note_settings(self) -> None:
        """Write the settings, for a later backfill with others to be refused."""
        (self.folder / SETTINGS).write_text(json.dumps(self._settings, indent=1) + "\n")

    def _check_settings(self, notify: Notify) -> None:
        path = self.folder / SETTINGS
        if not self.snapshots:
            return
        if not path.exists():
            notify(
                f"{self.folder}: a live run began it, which stores neither threshold nor metrics; that they are the "
                "same here is not checked"
            )
            return
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ArchiveError(f"{path}: is damaged ({error}); pass another folder as --out") from error
        differ = [
            f"{name} {before.get(name)!r} (now {value!r})"
            for name, value in self._settings.items()
            if before.get(name) != value
        ]
        if differ:
            raise ArchiveError(
                f"{self.folder}: was filled with {', '.join(differ)}; pass the same, or another folder as --out"
            )


@contextmanager
def archive_to_fill(
    folder: Path, probe: ProbeBatch, settings: Mapping[str, Any], notify: Notify
) -> Iterator[ArchiveToFill]:
    """The archive for this process alone, where it is empty or of the same images and settings, else `ArchiveError`.

    Folders that were made for nothing are removed.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing_to(folder):
        claim = claim_to_fill(folder)
    if claim is None:
        who = owner(folder) or "another process"
        raise ArchiveError(f"{folder}: {who} writes here. Wait for its end, or pass another folder as --out")
    try:
        remove_unfinished(folder)
        stored = folder / "probe.npz"
        if stored.exists() and not _same(probe, ProbeBatch.load(stored)):
            raise ArchiveError(
                f"{folder}: is of other images or masks; pass --probe {stored}, or another folder as --out"
            )
        yield ArchiveToFill(claim, settings, notify)
    finally:
        claim.release()
        for path in made:
            with suppress(OSError):  # it holds something, or is gone
                path.rmdir()


def remember(monitor: AttentionMonitor, snapshot: Snapshot) -> None:
    """Add a snapshot of the archive to the monitor's past, and to what its health flags follow."""
    measured: Measured = {key: {} for key in snapshot.layers}
    for (role, layer), values in measured.items():
        for metric in RESTORED:
            of_heads = [v for k, v in snapshot.metrics.items() if k[:3] == (role, layer, metric) and k.head is not None]
            if of_heads:
                values[metric] = torch.tensor([of_heads])  # (1, H): means over images, which is what is followed
    monitor.health.examine(snapshot.step, snapshot.layers, measured)
    monitor.remember(snapshot)


def _facts(snapshot: Snapshot) -> dict[str, str]:
    return {
        f"{role}, layer {layer}": f"{a.rows.shape[1]} heads, grid {a.grid}, query {a.query}"
        for (role, layer), a in snapshot.layers.items()
    }


def _same(a: ProbeBatch, b: ProbeBatch) -> bool:
    """Compare images and masks: metrics depend on both."""
    if a.masks is None or b.masks is None:
        return a.has_same_images_as(b) and a.masks is b.masks
    return a.has_same_images_as(b) and torch.equal(a.masks, b.masks)
