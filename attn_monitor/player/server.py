"""The server side of the live page: names of runs, new steps of a run, and one layer's numbers at one step.

Requested names are looked up among the archives that were found, and never become paths. Only metrics are kept in
memory; numbers are read from the archive for each request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attn_monitor.errors import ArchiveError
from attn_monitor.player import blocks
from attn_monitor.player.contents import MAX_VALUES, images_of, pictures_in, step_facts
from attn_monitor.player.slices import in_slices
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.archive import load_step, snapshot_paths, step_of
from attn_monitor.record.file_names import tag_safe_names

READING_SECONDS = 0.7  # spent on new snapshots in one request; the page requests the rest later


class Library:
    """The archives that ``find`` returns, by name. Raises KeyError where there is none, `ArchiveError` where broken."""

    def __init__(self, find: Callable[[], Mapping[str, Path]]) -> None:
        self._find = find
        self._open: dict[str, _Archive] = {}
        self._lock = threading.Lock()

    def runs(self) -> dict[str, Any]:
        """Names of all runs."""
        return {"runs": sorted(self._find())}

    def run(self, name: str, after: int, generation: str) -> dict[str, Any]:
        """A run's steps later than ``after``; all of the run where it has another ``generation`` by now."""
        return self._archive(name).facts(after, generation)

    def block(self, name: str, step: int, layer: int) -> bytes:
        """Numbers of a layer at a step, see `blocks`."""
        return self._archive(name).block(step, layer)

    def _archive(self, name: str) -> _Archive:
        folder = self._find().get(name)
        if folder is None:
            raise KeyError("no such run")
        with self._lock:
            return self._open.setdefault(name, _Archive(name, folder))


class _Archive:
    """One archive. It may grow; it starts a new generation where files change or come in between, as after a resume."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._lock = threading.Lock()
        self._number = 0
        self._forget()

    def facts(self, after: int, generation: str) -> dict[str, Any]:
        with self._lock:
            pending = self._read()
            known = {path: step for path, step in self._steps.items() if step is not None}
            if not known:
                raise ArchiveError("no snapshot of this run can be shown")
            new = generation != self._generation
            steps = [step for path, step in sorted(known.items()) if new or step_of(path) > after]
            state = {"generation": self._generation, "pending": pending, "layouts": self._layouts, "steps": steps}
            return {**state, "name": self.name, "note": self._note(), **(self._images if new else {})}

    def block(self, step: int, layer: int) -> bytes:
        path = next((p for p in _own_files(self.folder) if step_of(p) == step), None)
        if path is None:
            raise KeyError("no such step")
        snapshot = in_slices(load_step(path), self._pictures)
        if layer not in {index for _, index in snapshot.layers}:
            raise KeyError("no such layer")
        return blocks.block(snapshot, layer)

    @property
    def _generation(self) -> str:
        return str(self._number)

    def _forget(self) -> None:
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._steps: dict[Path, dict[str, Any] | None] = {}  # None: cannot be shown
        self._layouts: list[blocks.Layout] = []
        self._images: dict[str, Any] = {}
        self._names: tuple[str, ...] = ()
        self._pictures = 0
        self._number += 1

    def _read(self) -> int:
        """Read new snapshots for a while; return how many are left to read."""
        paths = _own_files(self.folder)
        stamps = {path: _stamp(path) for path in paths}
        between = [path for path in paths if path not in self._steps and path < max(self._steps, default=path)]
        if between or any(stamps.get(path) != stamp for path, stamp in self._stamps.items()):
            self._forget()
        if not self._images:
            self._read_images()
        until = time.monotonic() + READING_SECONDS
        left = [path for path in paths if path not in self._steps]
        for count, path in enumerate(left):
            if count and time.monotonic() > until:
                return len(left) - count
            self._steps[path] = self._facts_of(path, len(paths))
            self._stamps[path] = stamps[path]
        return 0

    def _read_images(self) -> None:
        path = self.folder / "probe.npz"
        if path.is_symlink() or not path.exists():
            raise ArchiveError("this run has no probe.npz")
        probe = ProbeBatch.load(path)
        pictures = pictures_in(_own_files(self.folder), probe)
        self._images, self._names, self._pictures = images_of(probe, pictures), probe.names, len(pictures.names)

    def _facts_of(self, path: Path, count: int) -> dict[str, Any] | None:
        try:
            snapshot = in_slices(load_step(path), self._pictures)
        except (ArchiveError, OSError):
            return None
        if tag_safe_names(snapshot.names) != self._names:
            return None
        layout, facts = blocks.layout_of(snapshot), step_facts(snapshot)
        if layout not in self._layouts:
            self._layouts.append(layout)
        if count * sum(map(len, facts["metrics"].values())) > MAX_VALUES:
            facts["metrics"] = {key: values[:1] for key, values in facts["metrics"].items()}
        return {**facts, "layout": self._layouts.index(layout)}

    def _note(self) -> str:
        broken = [path.name for path, step in self._steps.items() if step is None]
        return f"Cannot be shown: {', '.join(broken)}" if broken else ""


def _own_files(folder: Path) -> list[Path]:
    """Snapshots in the folder, without symbolic links, which may lead anywhere."""
    return [path for path in snapshot_paths(folder) if not path.is_symlink()]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
