"""Runs on disk: which archive a path means, and its snapshots one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attn_monitor.errors import ArchiveError
from attn_monitor.offline.results import progress
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.archive import load_step, snapshot_paths
from attn_monitor.record.file_names import tag_safe_names
from attn_monitor.record.snapshot import AttentionSnapshot


def find_archive(run: str | Path) -> Path:
    """The archive that a path means: the folder itself, or the one folder with snapshots up to two levels below it.

    Raises FileNotFoundError where there is none, and `ArchiveError` naming them where there are several.
    """
    folder = Path(run)
    if snapshot_paths(folder):
        return folder
    below = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_dir()]
    found = [path for path in below if snapshot_paths(path) and not path.name.startswith("superseded-")]
    if not found:
        raise FileNotFoundError(
            f"{folder}: no snapshots (step-*.npz) here; expected the attn_monitor folder of a run, or the log "
            "directory that holds it"
        )
    if len(found) > 1:
        raise ArchiveError(f"{folder}: {len(found)} archives are here; choose one of {', '.join(map(str, found))}")
    return found[0]


def read_archive(folder: Path) -> Iterator[AttentionSnapshot]:
    """Snapshots in order of steps, read one at a time."""
    return map(load_step, progress(snapshot_paths(folder), f"reading {folder}"))


def read_probe(folder: Path) -> ProbeBatch:
    """The probe of an archive folder."""
    path = folder / "probe.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist; it holds the images that snapshots beside it were taken of")
    return ProbeBatch.load(path)


def check_belongs(probe: ProbeBatch, snapshot: AttentionSnapshot, where: Path) -> None:
    """Raise `ArchiveError` unless these are the images that a snapshot was taken of, by their names."""
    if tag_safe_names(snapshot.names) != probe.names:
        raise ArchiveError(
            f"{where}: step {snapshot.step} shows {', '.join(snapshot.names)}, and probe.npz holds "
            f"{', '.join(probe.names)}: these are files of two runs"
        )
