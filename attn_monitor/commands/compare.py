"""Compare two runs on one probe: maps side by side with their difference, and metrics as a table and charts.

Each step of one run is matched with the nearest step of the other, where that is mutual.

Example: attn-monitor compare runs/version_0 runs/version_1 --out comparison
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attn_monitor.commands.support.results import notify, print_table, progress, results_in
from attn_monitor.commands.support.runs import StoredRun
from attn_monitor.draw.canvas import Pixels
from attn_monitor.draw.charts import Line, chart_sheet
from attn_monitor.draw.differences import COLOURS, comparison
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import ArchiveError
from attn_monitor.measurements import Metrics
from attn_monitor.record.file_names import file_name
from attn_monitor.record.thinning import thin
from attn_monitor.snapshot import Snapshot

Pair = tuple[Snapshot, Snapshot]
MetricRow = tuple[str, int, str, float, float]
"""Role, layer, metric and its value in A and in B: means over heads and images."""


class Side:
    """One side of a comparison: a run, and the metrics of each of its steps that can be read."""

    def __init__(self, path: str | Path) -> None:
        self.run = StoredRun(path)
        self.name, self.probe = self.run.name, self.run.probe
        self.metrics: dict[int, Metrics] = {snapshot.step: snapshot.metrics for snapshot in self.run}

    def curves(self, role: str, layer: int) -> dict[str, list[tuple[int, float]]]:
        """Return a layer's metrics as points (step, value), where they are finite."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for step, metrics in self.metrics.items():
            for metric, value in metrics.of_layer(role, layer).items():
                if math.isfinite(value):
                    curves.setdefault(metric, []).append((step, value))
        return curves


@dataclass(frozen=True)
class Comparison:
    """Two runs on one probe.

    Attributes:
        a: the first run.
        b: the second run.
        steps: matched steps, (of A, of B).
        layers: layers (role, index) that both have, in one shape.
        left_out: layers that only one has.
    """

    a: Side
    b: Side
    steps: tuple[tuple[int, int], ...]
    layers: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, int], ...]

    def pair(self, number: int) -> Pair:
        """Load the two snapshots of a matched step; `ArchiveError` where they cannot be compared."""
        a, b = self.steps[number]
        pair = self.a.run.load(a), self.b.run.load(b)
        _common_layers(self.a, self.b, pair)
        return pair

    def pictures(
        self, number: int, *, every_layer: bool = False, options: DrawingOptions = DrawingOptions()
    ) -> Iterator[tuple[str, Pixels]]:
        """Yield each image's name, and its maps at a matched step as a picture, uint8 (height, width, 3)."""
        pair, names, probe = self.pair(number), (self.a.name, self.b.name), self.a.probe
        last = {role: (role, layer) for role, layer in self.layers}
        layers = self.layers if every_layer else tuple(last.values())
        for index, (name, photo) in enumerate(zip(probe.names, probe.pixels, strict=True)):
            truth = None if probe.masks is None else probe.masks[index].numpy()
            yield name, comparison(pair, names, index, photo, layers, truth=truth, options=options)

    def table(self) -> list[MetricRow]:
        """Return the metrics that both have at the last matched step."""
        a, b = self.a.metrics[self.steps[-1][0]], self.b.metrics[self.steps[-1][1]]
        return [
            (*key, metric, value, others[metric])
            for key in self.layers
            for others in [b.of_layer(*key)]
            for metric, value in a.of_layer(*key).items()
            if metric in others
        ]

    def charts(self) -> Pixels:
        """Draw every metric over the steps of both, uint8 (height, width, 3)."""
        sections: dict[str, dict[str, list[Line]]] = {}
        for role, layer in self.layers:
            charts = sections[f"{role} · layer {layer}"] = {}
            for colour, side in zip(COLOURS, (self.a, self.b), strict=True):
                for metric, points in side.curves(role, layer).items():
                    charts.setdefault(metric, []).append((colour, points))
        title = [(f"A: {self.a.name}", COLOURS[0]), (f"B: {self.b.name}", COLOURS[1])]
        return chart_sheet(title, sections)


def compare_runs(a: str | Path, b: str | Path) -> Comparison:
    """Match two runs or snapshots; broken snapshots are left out.

    Args:
        a: an archive, a log directory that holds one, a folder of results of `show`, or one snapshot's file.
        b: another one, of the same images.

    Raises:
        FileNotFoundError: there are no snapshots.
        ArchiveError: they cannot be compared: other images, queries, grids, heads or layers.
    """
    first, second = Side(a), Side(b)
    _check_probes(first, second)
    steps = match_steps(list(first.metrics), list(second.metrics))
    last = first.run.load(steps[-1][0]), second.run.load(steps[-1][1])
    return Comparison(first, second, tuple(steps), *map(tuple, _common_layers(first, second, last)))


def compare(
    a: str, b: str, *, out: str, steps: int = 4, every_layer: bool = False, drawing: DrawingOptions = DrawingOptions()
) -> None:
    """Run `attn-monitor compare`, which this module describes.

    Args:
        a: the archive of a run, the log directory that holds it, a folder that `show` has written to, or a single
            snapshot beside its probe.npz. Broken snapshots are left out and named.
        b: another one of the same images.
        out: folder for the pictures.
        steps: how many of the matched steps are drawn, evenly spaced, first and last included.
        every_layer: draw each layer that both have, not only the last one of each role.
        drawing: how to draw; its values are options of their own.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1")
    found = compare_runs(a, b)
    if found.left_out:
        notify(f"not in both, and left out: {', '.join(f'layer {layer} of {role}' for role, layer in found.left_out)}")
    chosen = thin([pair[0] for pair in found.steps], steps) if steps > 1 else [len(found.steps) - 1]
    with results_in(Path(out)) as results:
        for number in progress(chosen, "drawing"):
            step = "-".join(map(str, dict.fromkeys(found.steps[number])))
            pictures = found.pictures(number, every_layer=every_layer, options=drawing)
            for name, picture in pictures:
                results.save(results.folder / file_name(f"{name}-step{step}", ".png"), picture)
        if found.table():
            results.save(results.folder / "metrics.png", found.charts())
    print("matched steps (A = B): " + ", ".join(f"{x:,}" if x == y else f"{x:,} = {y:,}" for x, y in found.steps))
    last = found.steps[-1]
    titles = "role", "layer", "metric", f"A, step {last[0]:,}", f"B, step {last[1]:,}", "B - A"
    rows = [(r, str(n), m, f"{x:.3g}", f"{y:.3g}", f"{y - x:+.3g}") for r, n, m, x, y in found.table()]
    print_table([titles, *rows])
    if broken := found.a.run.broken + found.b.run.broken:
        raise ArchiveError(f"the comparison is without {'; '.join(broken)}")


def match_steps(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of steps that are nearest to each other, ascending; the earlier of two that are as near."""

    def nearest(step: int, among: Sequence[int]) -> int:
        return min(among, key=lambda other: (abs(other - step), other))

    pairs = [(step, nearest(step, b)) for step in a]
    return [(x, y) for x, y in pairs if nearest(y, a) == x]


def _check_probes(a: Side, b: Side) -> None:
    if not a.probe.has_same_images_as(b.probe):
        first, second = a.probe, b.probe
        names = f"{', '.join(first.names)} and {', '.join(second.names)}"
        if len(first) != len(second):
            names = f"{len(first)} ({', '.join(first.names)}) and {len(second)} ({', '.join(second.names)})"
        elif first.images.shape != second.images.shape:
            sizes = (" × ".join(map(str, probe.images.shape[-2:])) for probe in (first, second))
            names += f", of other sizes, {' and '.join(sizes)} pixels"
        raise ArchiveError(
            f"{a.name} and {b.name} show different images, whose maps cannot be compared: {names}. Watch both on one "
            "probe"
        )


def _common_layers(a: Side, b: Side, pair: Pair) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return the layers that both have, and those that one has; `ArchiveError` where none is common, or one differs."""
    both = [key for key in pair[0].layers if key in pair[1].layers]
    if not both:
        layers = [", ".join(f"layer {layer} of {role}" for role, layer in snapshot.layers) for snapshot in pair]
        raise ArchiveError(f"no layer is in both: {a.name} holds {layers[0]}, and {b.name} {layers[1]}")
    for role, layer in both:
        x, y = (snapshot.layer(role, layer) for snapshot in pair)
        for what, values in {
            "grid": (x.grid, y.grid),
            "number of heads": (x.rows.shape[1], y.rows.shape[1]),
            "query": (x.query, y.query),
            "place of patches": (x.geometry or "the whole image", y.geometry or "the whole image"),
        }.items():
            if values[0] != values[1]:
                raise ArchiveError(
                    f"layer {layer} of {role} cannot be compared: its {what} is {values[0]} in {a.name} and "
                    f"{values[1]} in {b.name}"
                )
    return both, [key for snapshot in pair for key in snapshot.layers if key not in both]
