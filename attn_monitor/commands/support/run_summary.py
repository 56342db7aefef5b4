"""`RunSummary`: a run's steps, flags, and each metric's course, as values; `attn-monitor summary` prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from attn_monitor.attention import LayerAttention
from attn_monitor.commands.support.runs import StoredRun
from attn_monitor.measure.run_history import RunHistory
from attn_monitor.measure.verdict import judge
from attn_monitor.measurements import HealthFlag, Verdict

BEST = {
    "jaccard": "highest",
    "jaccard_best_head": "highest",
    "jaccard_fixed_head": "highest",
    "outlier_fraction": "lowest",
}
"""Metrics for which more, or less, is better whatever the model; others have extremes and no best."""

CHANGED = 0.01  # of entropy: less is no change
NO_VERDICT = Verdict("no verdict yet")


class Point(NamedTuple):
    """A value at a step."""

    step: int
    value: float


@dataclass(frozen=True)
class Curve:
    """One metric over the run, the mean over heads and images, without the steps at which it is NaN or missing."""

    metric: str
    points: tuple[Point, ...]

    @property
    def first(self) -> Point:
        """The point at the first step."""
        return self.points[0]

    @property
    def last(self) -> Point:
        """The point at the last step."""
        return self.points[-1]

    @property
    def low(self) -> Point:
        """The first point with the smallest value."""
        return min(self.points, key=lambda point: point.value)

    @property
    def high(self) -> Point:
        """The first point with the largest value."""
        return max(self.points, key=lambda point: point.value)

    @property
    def best(self) -> Point | None:
        """The better extreme of a metric in `BEST`; None for others."""
        return {"highest": self.high, "lowest": self.low}.get(BEST.get(self.metric, ""))


@dataclass(frozen=True)
class LayerSummary:
    """A watched layer: what it is, and its metrics over the run."""

    role: str
    layer: int
    name: str
    model: str
    query: str
    heads: int
    grid: tuple[int, ...]
    places: str
    kind: str
    curves: tuple[Curve, ...]

    @classmethod
    def of(cls, role: str, a: LayerAttention, curves: Sequence[Curve]) -> LayerSummary:
        """Summarise a layer by its attention at the last step."""
        heads = a.rows.shape[1]
        return cls(role, a.layer, a.name, a.model, a.query, heads, tuple(a.grid), a.places, a.kind, tuple(curves))

    @property
    def title(self) -> str:
        """The layer in one line."""
        model = f" {self.model}" if self.model else ""
        query = f", query {self.query}" if self.query else ""
        kind = "" if self.kind == "distribution" else f", {self.kind}"
        where = f"{self.role}{model}, layer {self.layer} ({self.name})"
        return f"{where}: {self.heads} heads, {' × '.join(map(str, self.grid))} patches{query}{kind}"


@dataclass(frozen=True)
class ModelSummary:
    """What was measured of a whole model in training's own forwards; of the role "training" the loss."""

    role: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class RunSummary:
    """A run's steps, images, layers and flags, and a verdict in words; ``broken`` says what could not be read."""

    archive: Path
    steps: tuple[int, ...]
    images: tuple[str, ...]
    flags: tuple[HealthFlag, ...]
    layers: tuple[LayerSummary, ...]
    models: tuple[ModelSummary, ...] = ()
    health: Verdict = NO_VERDICT
    broken: tuple[str, ...] = ()

    @property
    def verdict(self) -> list[str]:
        """The verdict, a sentence on flags, and one for each role on the course of entropy in its last layer."""
        last = {layer.role: layer for layer in self.layers}
        judged = f"{self.health}".rstrip(".")
        return [
            f"{judged[0].upper()}{judged[1:]}.",
            _of_flags(self.flags),
            *(_of_entropy(layer) for layer in last.values()),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "archive": str(self.archive),
            "health": self.health.as_dict(),
            "verdict": self.verdict,
            "steps": list(self.steps),
            "images": list(self.images),
            "flags": [flag.state_dict() for flag in self.flags],
            "layers": [_layer_as_dict(layer) for layer in self.layers],
            "models": [{"role": model.role, "metrics": _curves_as_dict(model.curves)} for model in self.models],
            "broken": list(self.broken),
        }


def summarise_run(run: str | Path) -> RunSummary:
    """Summarise a run: its steps, flags, and each layer's metrics from first to last.

    Args:
        run: an archive, a log directory that holds one, a folder of results of `show`, or one snapshot's file.

    Returns:
        The summary; ``broken`` lists snapshots that could not be read.

    Raises:
        FileNotFoundError: there are no snapshots.
        ArchiveError: none can be read, or several archives are below the path.
    """
    found = StoredRun(run)
    steps: list[int] = []
    images: tuple[str, ...] = ()
    progress = RunHistory()
    flags: list[HealthFlag] = []
    attention: dict[tuple[str, int], LayerAttention] = {}
    curves: dict[tuple[str, int | None], dict[str, list[Point]]] = {}
    for snapshot in found:
        steps.append(snapshot.step)
        images = snapshot.names
        flags += snapshot.flags
        progress.add(snapshot.step, snapshot.metrics)
        attention.update(snapshot.layers)
        for key, value in snapshot.metrics.items():
            if key.head is None and math.isfinite(value):
                of_layer = curves.setdefault((key.role, key.layer), {})
                of_layer.setdefault(key.metric, []).append(Point(snapshot.step, value))
    of = {key: [Curve(metric, tuple(points)) for metric, points in lines.items()] for key, lines in curves.items()}
    layers = [LayerSummary.of(role, a, of.get((role, layer), [])) for (role, layer), a in attention.items()]
    models = [ModelSummary(role, tuple(lines)) for (role, layer), lines in of.items() if layer is None]
    return RunSummary(
        found.folder,
        tuple(steps),
        images,
        tuple(flags),
        tuple(layers),
        tuple(models),
        judge(progress),
        tuple(found.broken),
    )


def _layer_as_dict(layer: LayerSummary) -> dict[str, Any]:
    facts = {f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "curves"}
    return {**facts, "metrics": _curves_as_dict(layer.curves)}


def _curves_as_dict(curves: Sequence[Curve]) -> dict[str, Any]:
    return {curve.metric: _curve_as_dict(curve) for curve in curves}


def _curve_as_dict(curve: Curve) -> dict[str, Any]:
    ends = {name: getattr(curve, name)._asdict() for name in ("first", "low", "high", "last")}
    best = None if curve.best is None else {**curve.best._asdict(), "is": BEST[curve.metric]}
    return {**ends, "best": best, "steps": [p.step for p in curve.points], "values": [p.value for p in curve.points]}


def _of_flags(flags: Sequence[HealthFlag]) -> str:
    if not flags:
        return "No health flag was raised."
    first = min(flags, key=lambda flag: flag.step)
    count = "One health flag was" if len(flags) == 1 else f"{len(flags)} health flags were"
    return f"{count} raised, the first at step {first.step:,} ({first.kind}, {first.where})."


def _of_entropy(layer: LayerSummary) -> str:
    """Describe the course of entropy; an extreme beyond both ends is named with its step."""
    where = f"{layer.role}, layer {layer.layer}:"
    curve = next((c for c in layer.curves if c.metric == "entropy"), None)
    if curve is None:
        return f"{where} no entropy was measured."
    first, last = curve.first, curve.last
    if len(curve.points) == 1:
        return f"{where} entropy is {last.value:.2f} at step {last.step:,}, the only one."
    ends = sorted([first.value, last.value])
    turn = max((curve.low, curve.high), key=lambda p: max(ends[0] - p.value, p.value - ends[1]))
    if max(ends[0] - turn.value, turn.value - ends[1]) > CHANGED:
        there, back = ("fell", "rose") if turn.value < first.value else ("rose", "fell")
        return (
            f"{where} entropy {there} from {first.value:.2f} to {turn.value:.2f} at step {turn.step:,}, and {back} to "
            f"{last.value:.2f} since."
        )
    if abs(last.value - first.value) <= CHANGED:
        return f"{where} entropy stayed at {last.value:.2f} ({'near uniform' if last.value > 0.99 else 'no change'})."
    return (
        f"{where} entropy {'fell' if last.value < first.value else 'rose'} from {first.value:.2f} to {last.value:.2f}."
    )
