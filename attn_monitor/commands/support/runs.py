"""Runs on disk: the archive that a path leads to, and its snapshots one after another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from attn_monitor.commands.support.results import progress
from attn_monitor.errors import ArchiveError
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.archive import load_step, snapshot_paths
from attn_monitor.record.file_names import tag_safe_names
from attn_monitor.record.folder_claim import remove_stale
from attn_monitor.record.snapshot_file import read_snapshot
from attn_monitor.snapshot import Snapshot

SHOWN = "attention.npz"  # the one snapshot in a folder of results of `show`


class StoredRun:
    """The snapshots at a path, read one at a time, and their probe.

    The path is an archive, a log directory that holds one, a folder that `show` has written to, or one snapshot's file.
    Snapshots that cannot be read are left out: ``broken`` says which and why, once the run has been gone through.
    Raises FileNotFoundError where there are none, and `ArchiveError` where several archives are meant.
    """

    def __init__(self, path: str | Path) -> None:
        single = next((file for file in (Path(path), Path(path) / SHOWN) if file.is_file()), None)
        self.paths = snapshot_paths(find_archive(path)) if single is None else [single]
        self._load = load_step if single is None else read_snapshot
        self._read: dict[int, Path] = {}
        self.name, self.folder = str(path), self.paths[0].parent
        self.broken: list[str] = []
        remove_stale(self.folder)

    def __iter__(self) -> Iterator[Snapshot]:
        """Yield snapshots in order of steps; `ArchiveError` at the end where none could be read."""
        for path in progress(self.paths, f"reading {self.folder}"):
            try:
                snapshot = self._load(path)
            except (ArchiveError, OSError) as error:
                self.broken.append(str(error))
            else:
                self._read[snapshot.step] = path
                yield snapshot
        if len(self.broken) == len(self.paths):
            raise ArchiveError(f"no snapshot can be read: {'; '.join(self.broken)}")

    def load(self, step: int) -> Snapshot:
        """Load the snapshot of a step again that has been read; `ArchiveError` where it is not of the probe."""
        snapshot = self._load(self._read[step])
        self.check_belongs(snapshot)
        return snapshot

    @cached_property
    def probe(self) -> ProbeBatch:
        """The images of the snapshots."""
        path = self.folder / "probe.npz"
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: does not exist; it holds the images that the snapshots were taken of, and belongs beside them"
            )
        return ProbeBatch.load(path)

    def check_belongs(self, snapshot: Snapshot) -> None:
        """Raise `ArchiveError` unless the probe's images are those that a snapshot was taken of, by their names."""
        if tag_safe_names(snapshot.names) != self.probe.names:
            raise ArchiveError(
                f"{self.folder}: step {snapshot.step} shows {', '.join(snapshot.names)}, and probe.npz holds "
                f"{', '.join(self.probe.names)}: these are files of two runs"
            )


def find_archive(run: str | Path) -> Path:
    """Return the archive at a path: the folder itself, or the one folder with snapshots up to four levels below it.

    Raises FileNotFoundError where there is none, and `ArchiveError` naming them where there are several.
    """
    folder = Path(run)
    if snapshot_paths(folder):
        return folder
    below = [path for depth in range(1, 5) for path in sorted(folder.glob("/".join("*" * depth))) if path.is_dir()]
    found = [path for path in below if snapshot_paths(path) and not path.name.startswith("superseded-")]
    if not found:
        wrong = "no snapshots (step-*.npz) here" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{folder}: {wrong}; expected the attn_monitor folder of a run, or the log directory that holds it"
        )
    if len(found) > 1:
        raise ArchiveError(f"{folder}: {len(found)} archives are here; choose one of {', '.join(map(str, found))}")
    return found[0]
