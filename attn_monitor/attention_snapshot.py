"""`AttentionSnapshot`: a `Snapshot` that can be saved, loaded and plotted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from attn_monitor.draw.notebook import png_of, snapshot_figure, snapshot_sheet
from attn_monitor.record.archive import load_step, snapshot_paths
from attn_monitor.record.snapshot_file import read_snapshot, write_snapshot
from attn_monitor.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AttentionSnapshot(Snapshot):
    """Hold attention of every role and layer on the probe at one step, with its metrics and health flags.

    A notebook shows a snapshot as a sheet of its maps.

    Args:
        step: optimizer steps done.
        epoch: from 0 on.
        names: names of the probe's images.
        layers: (role, layer) to a `LayerAttention` on the CPU.
        metrics: values by `MetricKey` (role, layer, metric, head).
        flags: the health flags raised at this step.
        flags_raised: how many flags the run has raised so far, these included.
        verdict: what has become of the run so far, None if it was not judged.

    Example:
        >>> import torch
        >>> from attn_monitor import LayerAttention
        >>> rows = torch.full((1, 2, 5), 0.2)
        >>> layer = LayerAttention(11, "blocks.11.attn", rows, 1, (2, 2), mixed=False, verified_error=0.0)
        >>> snapshot = AttentionSnapshot(0, 0, ("cat",), {("teacher", 11): layer})
        >>> snapshot.roles, snapshot.maps("teacher").shape
        (('teacher',), torch.Size([1, 2, 2, 2]))
    """

    @classmethod
    def of(cls, snapshot: Snapshot) -> AttentionSnapshot:
        """Convert a plain `Snapshot`."""
        return cls(**vars(snapshot))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the snapshot to a file by way of a temporary name, so that readers never see half a file."""
        write_snapshot(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionSnapshot:
        """Read a snapshot from a file.

        Raises:
            ArchiveError: The file is not a snapshot, or its parts contradict each other.
        """
        return cls.of(read_snapshot(Path(path)))

    def plot(self, image: int = 0, *, role: str | None = None, layer: int = -1, slice: int | None = None) -> Figure:
        """Plot one image's maps; this requires matplotlib.

        Args:
            image: index of the image.
            role: None is the last role.
            layer: index of a captured layer; a negative one counts from the last.
            slice: frame of a clip, or slice of a volume, the last one where there are fewer; None is their mean.
        """
        return snapshot_figure(self, image, role, layer, slice)

    def _repr_png_(self) -> bytes:
        return png_of(snapshot_sheet(self))


def load_snapshots(folder: str | os.PathLike[str]) -> list[AttentionSnapshot]:
    """Read all snapshots of an archive folder, in order of steps.

    Args:
        folder: the ``attn_monitor`` folder in the log directory of a run.

    Raises:
        FileNotFoundError: The folder holds no snapshots.
        ArchiveError: A file is damaged.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from attn_monitor import LayerAttention
        >>> layer = LayerAttention(0, "attn", torch.full((1, 2, 5), 0.2), 1, (2, 2), mixed=False, verified_error=0.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (0, 100):
        ...         snapshot = AttentionSnapshot(step, 0, ("cat",), {("teacher", 0): layer})
        ...         snapshot.save(f"{folder}/step-{step:09d}.npz")
        ...     [snapshot.step for snapshot in load_snapshots(folder)]
        [0, 100]
    """
    paths = snapshot_paths(Path(folder))
    if not paths:
        raise FileNotFoundError(f"{folder}: no snapshots (step-*.npz) here; expected the attn_monitor folder of a run")
    return [AttentionSnapshot.of(load_step(path)) for path in paths]
