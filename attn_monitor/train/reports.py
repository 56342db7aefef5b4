"""User-facing texts: what was found, how it is watched, and what loggers do not get."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_monitor.capture.recording_plan import ModelSummary
from attn_monitor.grid import Grid
from attn_monitor.measurements import HealthFlag, Verdict
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.trackers.registry import tracker_for
from attn_monitor.train.cost import FREE, SHARE
from attn_monitor.train.options import RunOptions
from attn_monitor.train.schedule import Schedule


def found_text(
    found: Mapping[str, ModelSummary],
    paths: Mapping[str, str],
    probe: ProbeBatch,
    *,
    schedule: Schedule,
    seconds: float,
    folder: Path | None,
    size: int,
    images: int,
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
        size: bytes of a snapshot in it.
        images: bytes of the probe in it.
        note: what was not found, empty if nothing is missing.
    """
    groups: dict[str, list[str]] = {}
    for role, one in found.items():
        groups.setdefault(str(one), []).append(role)
    models = [f"{' and '.join(named(role, paths) for role in roles)}: {text}" for text, roles in groups.items()]
    count = schedule.count()
    cost = f"about {_seconds(seconds)} each"
    if not schedule.is_given:
        cost += f", and fewer where they would take more than {FREE:g} s and {SHARE:.0%} of the loop in all"
    elif count is not None:
        cost += f", {_seconds(seconds * count)} in all"
    if count is None:
        space = f"about {_bytes(images)}, and {_bytes(size)} for each snapshot"
    else:
        space = f"about {_bytes(images + size * count)} in all, without the report"
    notes = list(dict.fromkeys(note for one in found.values() for note in one.notes))
    lines = [
        "watching " + "; ".join([*models, *([note] if note else []), *notes]),
        images_text(probe),
        f"a snapshot {schedule}, {cost}; " + ("no archive" if folder is None else f"archive in {folder}, {space}"),
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


def _bytes(value: float) -> str:
    unit = min(int(math.log10(max(value, 1)) / 3), 3)
    return f"{value / 1000**unit:.3g} {('bytes', 'KB', 'MB', 'GB')[unit]}"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def where_text(folder: Path, report: Path | None) -> str:
    """Name the report to open, or the archive where none could be written."""
    return f"archive in {folder}" if report is None else f"open {report} to see this run"


def health_text(flags: Sequence[HealthFlag], verdict: Verdict | None = None) -> str:
    """Give the verdict on the run, and list the health flags that were raised, with their number."""
    many = "" if len(flags) == 1 else "s"
    verdict_line = "" if verdict is None else f"verdict: {verdict}\n"
    return f"{verdict_line}{len(flags) or 'no'} health flag{many} raised" + "".join(f"\n  {flag}" for flag in flags)


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
    """Name what loggers do not get, as no method takes it; empty if nothing."""
    generic = [tracker for tracker in map(tracker_for, loggers) if tracker.names_ignored and tracker.ignored]
    return "; ".join(
        f"{tracker.label} gets no {', '.join(map(str.lower, tracker.ignored))}: it has no methods that "
        "take these, see docs/trackers.md"
        for tracker in generic
    )


def no_logger_text(archive: bool, folder: Path | str) -> str:
    """Warn of a run without any logger; ``archive`` is whether it has an archive, in or below ``folder``."""
    where = f"only written to the archive and as pictures, in {folder}" if archive else ""
    return (
        f"this trainer has no logger, so attention is {where or 'written nowhere, with dirpath=False'}. "
        "Pass logger=TensorBoardLogger(...) to watch it"
    )
