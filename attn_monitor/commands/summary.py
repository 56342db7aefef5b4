"""Print on one screen what has become of a run: a verdict, health flags, and each metric's course.

The verdict is made of the metrics in the archive, as in training. With --json the exit status is 3 where it is bad.

Metrics for which more, or less, is better whatever the model have a best step: overlap with ground truth (jaccard) and
the share of outlier tokens. All others have their lowest and highest value, with their steps.

Example: attn-monitor summary runs/version_0
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence

from attn_monitor.commands.support.results import print_table
from attn_monitor.commands.support.run_summary import BEST, Curve, Point, RunSummary, summarise_run
from attn_monitor.errors import ArchiveError
from attn_monitor.measurements import TRAINING
from attn_monitor.record.thinning import thin

BAD = 3  # exit status
BARS = "▁▂▃▄▅▆▇█"
SPARKLINE = 24  # characters
TITLES = "  metric", "first", "best", "lowest", "highest", "last", "from first to last, each scaled by itself"


def summary(run: str, *, every_layer: bool = False, json: bool = False) -> None:
    """Run `attn-monitor summary`, which this module describes.

    Args:
        run: the archive of a run, or the log directory that holds it. Broken snapshots are left out and named.
        every_layer: all metrics of each watched layer; else of each role's last, and the others' entropy.
        json: print JSON, for scripts; the exit status is 3 where the verdict is bad.
    """
    found = summarise_run(run)
    if json:
        print(jsonlib.dumps(found.as_dict(), indent=1))
    else:
        _print(found, every_layer)
    if json and found.health.is_bad and not found.broken:
        sys.exit(BAD)
    if found.broken:
        raise ArchiveError(f"the summary is without {'; '.join(found.broken)}")


def _print(found: RunSummary, every_layer: bool) -> None:
    first, last = found.steps[0], found.steps[-1]
    steps = f"{len(found.steps)} snapshots, steps {first:,} to {last:,}" if first < last else f"step {last:,} alone"
    print(f"{found.archive}: {steps}")
    print(f"images: {', '.join(found.images)}")
    print("\n" + "\n".join(found.verdict))
    for flag in found.flags:
        print(f"  {flag.kind}: {flag}")
    last_of = {layer.role: layer.layer for layer in found.layers}
    for layer in found.layers:
        all_metrics = every_layer or layer.layer == last_of[layer.role]
        rows = [_row(curve) for curve in layer.curves if all_metrics or curve.metric == "entropy"]
        print(f"\n{layer.title}")
        print_table([TITLES, *rows] if rows else [["  no metrics were measured"]])
    for model in found.models:
        print(f"\n{model.role}{'' if model.role == TRAINING else ', the whole model in training'}")
        print_table([TITLES, *map(_row, model.curves)])


def sparkline(values: Sequence[float]) -> str:
    """Draw a bar for each value, from the smallest to the largest; equal values are a line at the bottom."""
    low, span = min(values), max(values) - min(values)
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1)) if span > 0 else 0] for v in values)


def _row(curve: Curve) -> tuple[str, ...]:
    best = "" if curve.best is None else f"{_at(curve.best)} ({BEST[curve.metric]})"
    shown = thin([point.step for point in curve.points], SPARKLINE)
    bars = sparkline([curve.points[i].value for i in shown])
    ends = _number(curve.first.value), _number(curve.last.value)
    return f"  {curve.metric}", ends[0], best, _at(curve.low), _at(curve.high), ends[1], bars


def _at(point: Point) -> str:
    return f"{_number(point.value)} @ {point.step:,}"


def _number(value: float) -> str:
    return f"{value:.3g}"
