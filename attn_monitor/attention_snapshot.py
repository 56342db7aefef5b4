"""`AttentionSnapshot`: a `Snapshot` that can be saved, loaded and shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from attn_monitor.draw.notebook import snapshot_figure, snapshot_png
from attn_monitor.record.archive import load_step, snapshot_paths
from attn_monitor.record.snapshot_file import read_snapshot, write_snapshot
from attn_monitor.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AttentionSnapshot(Snapshot):
    """Attention of every role and layer on the probe at one step, on the host, with the metrics made from it.

    ``layers`` maps (role, layer) to a `LayerAttention`; ``names`` are the probe images'; ``metrics`` are values by
    `MetricKey` (role, layer, metric, head); ``flags`` are the health flags raised at this step, ``flags_raised`` how
    many the run has raised so far, these included. A notebook shows it as a sheet of its maps.
    """

    @classmethod
    def of(cls, snapshot: Snapshot) -> AttentionSnapshot:
        """A snapshot with the methods of this class."""
        return cls(**vars(snapshot))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a temporary name and rename, so that a reader never meets half a file."""
        write_snapshot(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionSnapshot:
        """Read a snapshot.

        Raises:
            ArchiveError: The file is not a snapshot, or its parts contradict each other.
        """
        return cls.of(read_snapshot(Path(path)))

    def plot(self, image: int = 0, *, role: str | None = None, layer: int = -1) -> Figure:
        """A matplotlib figure of an image's maps, of the last role where none is named; matplotlib must be there."""
        return snapshot_figure(self, image, role, layer)

    def _repr_png_(self) -> bytes:
        return snapshot_png(self)


def load_snapshots(folder: str | os.PathLike[str]) -> list[AttentionSnapshot]:
    """All snapshots of an archive folder, in order of steps.

    Args:
        folder: The ``attn_monitor`` folder in the log directory of a run.

    Raises:
        FileNotFoundError: The folder holds no snapshots.
        ArchiveError: A file is damaged.
    """
    paths = snapshot_paths(Path(folder))
    if not paths:
        raise FileNotFoundError(f"{folder}: no snapshots (step-*.npz) here; expected the attn_monitor folder of a run")
    return [AttentionSnapshot.of(load_step(path)) for path in paths]
