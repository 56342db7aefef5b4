"""User-facing texts: what was found, how it is watched, what that has cost, and what loggers do not get."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attn_monitor.capture.recording_plan import ModelSummary
from attn_monitor.grid import Grid
from attn_monitor.measurements import HealthFlag, Verdict
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.trackers.generic import Generic
from attn_monitor.trackers.registry import tracker_for
from attn_monitor.train.options import RunOptions
from attn_monitor.train.schedule import Schedule

SHARE = 0.05  # of the loop's time, for snapshots beyond the schedule


def found_text(
    found: Mapping[str, ModelSummary],
    paths: Mapping[str, str],
    probe: ProbeBatch,
    *,
    schedule: Schedule,
    seconds: float,
    folder: Path | None,
    note: str = "",
) -> str:
    """Describe in three lines what is watched, on which images, and when and where.

    Args:
        found: what was found of each role's model.
        paths: role to the model's path in the module.
        probe: the images.
        schedule: when snapshots are taken.
        seconds: what the first snapshot took.
        folder: of the archive, None without one.
        note: what was not found, empty if nothing is missing.
    """
    groups: dict[str, list[str]] = {}
    for role, one in found.items():
        groups.setdefault(str(one), []).append(role)
    models = [f"{' and '.join(named(role, paths) for role in roles)}: {text}" for text, roles in groups.items()]
    count = schedule.count()
    cost = f"about {_seconds(seconds)} each" + (f", {_seconds(seconds * count)} in all" if count is not None else "")
    notes = list(dict.fromkeys(note for one in found.values() for note in one.notes))
    lines = [
        "watching " + "; ".join([*models, *([note] if note else []), *notes]),
        images_text(probe),
        f"a snapshot {schedule}, {cost}; " + ("no archive" if folder is None else f"archive in {folder}"),
    ]
    return "\n  ".join(lines)


def images_text(probe: ProbeBatch) -> str:
    """Describe the probe: number, size and origin of its images."""
    kind = {"original": "given image"}.get(probe.caption, probe.caption)
    many = "s" if len(probe) > 1 else ""
    return f"on {len(probe)} {kind}{many} of {Grid(probe.channels_first.shape[2:])}"


def named(role: str, paths: Mapping[str, str]) -> str:
    """Name a role, with its path if that differs."""
    return role if paths.get(role, role) in ("", role) else f"{role} ({paths[role]})"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


@dataclass
class Cost:
    """Measure the seconds that watching takes on the training thread, discovery apart from snapshots."""

    snapshots: int = 0
    discovery: float = 0.0
    blocked: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    _latest: float = 0.0  # seconds of the latest snapshot
    _loop: tuple[float, float] | None = None  # when the first snapshot ended, and ``blocked`` at that time

    @contextmanager
    def of_discovery(self) -> Iterator[None]:
        """Count the time of a ``with`` block as discovery."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.discovery += time.perf_counter() - started

    @contextmanager
    def of_a_snapshot(self) -> Iterator[None]:
        """Count the time of a ``with`` block as a snapshot, without the discovery in it."""
        started, discovery, snapshots = time.perf_counter(), self.discovery, self.snapshots
        try:
            yield
        finally:
            ended = time.perf_counter()
            seconds = ended - started - (self.discovery - discovery)
            self.blocked += seconds
            if self.snapshots > snapshots:
                self._latest, self._loop = seconds, self._loop or (ended, self.blocked)

    def allows_another(self) -> bool:
        """Whether all snapshots after the first would, with one more, stay within ``SHARE`` of the loop's time."""
        if self._loop is None:
            return False
        began, before = self._loop
        return self.blocked - before + self._latest <= SHARE * (time.perf_counter() - began)

    def text(self, waited: float, behind: float) -> str:
        """Summarise in one line what watching has cost.

        Args:
            waited: seconds that the run waited at its end.
            behind: seconds spent on background threads.
        """
        wall = time.perf_counter() - self.started
        return (
            f"{self.snapshots} snapshots, {self.blocked:.1f} s on the training thread "
            f"({self.blocked / max(wall, 1e-9):.1%} of {wall:.0f} s) and {self.discovery:.1f} s for the first look, "
            f"{waited:.1f} s waiting at the end, {behind:.1f} s behind training"
        )


def where_text(folder: Path, report: Path | None) -> str:
    """Name the report to open, or the archive where none could be written."""
    return f"archive in {folder}" if report is None else f"open {report} to see this run"


def health_text(flags: Sequence[HealthFlag], verdict: Verdict | None = None) -> str:
    """Give the verdict on the run, and list the health flags that were raised, with their number."""
    many = "" if len(flags) == 1 else "s"
    said = "" if verdict is None else f"verdict: {verdict}\n"
    return f"{said}{len(flags) or 'no'} health flag{many} raised" + "".join(f"\n  {flag}" for flag in flags)


def settings_text(options: RunOptions, paths: Mapping[str, str], schedule: Schedule, probe: ProbeBatch) -> str:
    """Record in Markdown how a run is watched."""
    numbers = (", ".join(f"{v:.4g}" for v in values) for values in (probe.mean, probe.std))
    shown = {
        "images are normalised by": probe.source or "mean {}; std {}".format(*numbers),
        "targets": dict(paths),
        "layers": options.layers,
        "query": options.query,
        "metrics": ", ".join(options.metrics.selected),
        "gram_step": options.metrics.gram_step,
        "verify": options.metrics.verify,
        "features": options.features,
        "health": options.health,
        **vars(options.drawing),
        "every_n_train_steps": schedule.every_n_train_steps,
        "every_n_epochs": schedule.every_n_epochs,
    }
    return "\n".join(f"- {name}: `{value}`" for name, value in shown.items())


def ignored_text(loggers: Sequence[Any]) -> str:
    """Name what loggers of unknown classes do not get, as they lack a method; empty if nothing."""
    generic = [tracker for tracker in map(tracker_for, loggers) if type(tracker) is Generic and tracker.ignored]
    return "; ".join(
        f"{tracker.label} gets no {', '.join(map(str.lower, tracker.ignored))}: it has no methods for "
        "these, see docs/trackers.md"
        for tracker in generic
    )


def no_logger_text(archive: bool, folder: Path | str) -> str:
    """Warn of a run without any logger; ``archive`` is whether it has an archive, in or below ``folder``."""
    where = f"only written to the archive and as pictures, in {folder}" if archive else ""
    return (
        f"this trainer has no logger, so attention is {where or 'written nowhere, with dirpath=False'}. "
        "Pass logger=TensorBoardLogger(...) to watch it"
    )
