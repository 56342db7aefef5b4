"""What is said to people: warnings, and the line at the start of a run that tells what was found."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from attn_monitor.capture.recording_plan import ModelSummary
from attn_monitor.record.probe import ProbeBatch


def warn(text: str) -> None:
    """A warning without a place: no line of this package explains it, and none of the user's caused it."""
    warnings.warn_explicit(text, UserWarning, "attn_monitor", 0, module="attn_monitor")


def inform(text: str) -> None:
    """Tell how things go, where no framework's logging does: standard output is the loop's own."""
    print(text, file=sys.stderr, flush=True)


def found_text(
    found: Mapping[str, ModelSummary],
    paths: Mapping[str, str],
    probe: ProbeBatch,
    *,
    schedule: str,
    seconds: float,
    count: float | None,
    folder: Path | None,
) -> str:
    """One line: roles with their paths, layers, heads, grid, images and their statistics, schedule, cost, archive."""
    groups: dict[str, list[str]] = {}
    for role, one in found.items():
        groups.setdefault(str(one), []).append(role)
    models = [f"{' and '.join(_named(role, paths) for role in roles)}: {text}" for text, roles in groups.items()]
    cost = f"about {_seconds(seconds)} each" + (f", {_seconds(seconds * count)} in all" if count is not None else "")
    notes = list(dict.fromkeys(note for one in found.values() for note in one.notes))
    return "; ".join(
        [
            *models,
            images_text(probe),
            f"a snapshot {schedule}, {cost}",
            "no archive" if folder is None else f"archive in {folder}",
            *notes,
        ]
    )


def images_text(probe: ProbeBatch) -> str:
    """How many of whose images, and by which statistics they are shown."""
    kind = {"original": "given image"}.get(probe.caption, probe.caption)
    numbers = (", ".join(f"{v:.4g}" for v in values) for values in (probe.mean, probe.std))
    source = probe.source or "mean {}; std {}".format(*numbers)
    many = "s" if len(probe) > 1 else ""
    return f"{len(probe)} {kind}{many} of {probe.images.shape[-2]} × {probe.images.shape[-1]}, normalised by {source}"


def _named(role: str, paths: Mapping[str, str]) -> str:
    return role if paths.get(role, role) in ("", role) else f"{role} ({paths[role]})"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def cost_text(taken: int, looked: float, blocked: float, wall: float, waited: float, behind: float) -> str:
    """One line: what watching has cost, the first look apart from the snapshots."""
    return (
        f"{taken} snapshots, {blocked:.1f} s on the training thread ({blocked / max(wall, 1e-9):.1%} of {wall:.0f} s) "
        f"and {looked:.1f} s for the first look, {waited:.1f} s waiting at the end, {behind:.1f} s behind training"
    )


def settings_text(settings: Sequence[tuple[str, object]]) -> str:
    """Markdown that records how a run is watched."""
    return "\n".join(f"- {name}: `{value}`" for name, value in settings)
