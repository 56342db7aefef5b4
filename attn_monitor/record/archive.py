"""An archive folder: one file a step, read in the order of steps, and what a resumed run finds in it."""

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
    """File of a step; names sort in the order of steps."""
    return folder / f"step-{step:09d}.npz"


def snapshot_paths(folder: Path) -> list[Path]:
    """Files of an archive folder in order of steps; none where there is no such folder."""
    return sorted(path for path in folder.glob("step-*.npz") if re.fullmatch(r"step-[0-9]{9,18}", path.stem))


def step_of(path: Path) -> int:
    """The step that `snapshot_path` was made from."""
    return int(path.stem.removeprefix("step-"))


def load_step(path: Path) -> Snapshot:
    """A snapshot of an archive folder, which has the step that its file is named after."""
    snapshot = read_snapshot(path)
    if snapshot.step != step_of(path):
        raise ArchiveError(f"{path}: holds step {snapshot.step}, expected the step that the file is named after")
    return snapshot


def written_between(
    archive: Path, after: int, until: int, names: Sequence[str], warn: Callable[[str], None]
) -> list[Snapshot]:
    """Snapshots of these images at steps above ``after`` and up to ``until``; files that cannot be read are told."""
    read = []
    for path in snapshot_paths(archive):
        if after < step_of(path) <= until:
            safe_point()
            try:
                read.append(load_step(path))
            except (ArchiveError, OSError) as error:
                warn(f"a snapshot of this run is left out of film strips. {error}")
    return [s for s in read if s.names == tuple(names)]


def set_aside(archive: Path, after: int) -> str:
    """Move snapshots of later steps out of the way: the checkpoint that a run is resumed from has not seen them.

    Returns what to say of it, nothing where there are none.
    """
    later = [path for path in snapshot_paths(archive) if step_of(path) > after]
    if not later:
        return ""
    folder = next(f for n in itertools.count(1) if not (f := archive / f"superseded-{n}").exists())
    folder.mkdir()
    for path in later:
        path.rename(folder / path.name)
    steps = ", ".join(str(step_of(path)) for path in later[:20]) + (", …" if len(later) > 20 else "")
    return (
        f"this run is resumed from step {after}, and had gone on to step {step_of(later[-1])} before. Snapshots of "
        f"steps {steps} are moved to {folder}; in loggers these steps may be there twice"
    )
