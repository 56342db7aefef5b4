"""An archive folder: one snapshot file per step."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from attn_monitor.errors import ArchiveError
from attn_monitor.record.snapshot_file import read_snapshot
from attn_monitor.snapshot import Snapshot
from attn_monitor.workers import safe_point


def snapshot_path(folder: Path, step: int) -> Path:
    """Return the file of a step; names sort in the order of steps."""
    return folder / f"step-{step:09d}.npz"


def snapshot_paths(folder: Path) -> list[Path]:
    """List the snapshot files of a folder in order of steps; empty if the folder does not exist."""
    return sorted(path for path in folder.glob("step-*.npz") if re.fullmatch(r"step-[0-9]{9,18}", path.stem))


def step_of(path: Path) -> int:
    """Return the step of a file that `snapshot_path` named."""
    return int(path.stem.removeprefix("step-"))


def load_step(path: Path) -> Snapshot:
    """Read a snapshot; `ArchiveError` if its step is not the one in the file's name."""
    snapshot = read_snapshot(path)
    if snapshot.step != step_of(path):
        raise ArchiveError(f"{path}: holds step {snapshot.step}, expected the step in the file's name")
    return snapshot


def snapshots_between(
    archive: Path, after: int, until: int, names: Sequence[str], warn: Callable[[str], None]
) -> list[Snapshot]:
    """Read the snapshots of a range of steps.

    Args:
        archive: Folder of snapshots.
        after: Last step before the range.
        until: Last step of the range.
        names: Names of the images; snapshots of others are left out.
        warn: Gets a message for each file that cannot be read.
    """
    read = []
    for path in snapshot_paths(archive):
        if after < step_of(path) <= until:
            safe_point()
            try:
                read.append(load_step(path))
            except (ArchiveError, OSError) as error:
                warn(f"film strips leave out a snapshot that cannot be read. {error}")
    return [s for s in read if s.names == tuple(names)]


def set_aside(archive: Path, after: int) -> str:
    """Move snapshots of later steps into a folder `superseded-N`: the checkpoint of a resumed run is older than they.

    Args:
        archive: Folder of snapshots.
        after: Step of the checkpoint.

    Returns:
        A message for the user, empty if there are no later snapshots.
    """
    later = [path for path in snapshot_paths(archive) if step_of(path) > after]
    if not later:
        return ""
    folder = next(f for n in itertools.count(1) if not (f := archive / f"superseded-{n}").exists())
    folder.mkdir()
    for path in later:
        path.rename(folder / path.name)
    steps = ", ".join(str(step_of(path)) for path in later[:20]) + (", …" if len(later) > 20 else "")
    one = len(later) == 1
    what = f"The snapshot of step {steps} was" if one else f"Snapshots of steps {steps} were"
    return (
        f"this run resumed from step {after}, and had reached step {step_of(later[-1])} before. {what} moved to "
        f"{folder}; loggers may hold {'this step' if one else 'these steps'} twice"
    )
