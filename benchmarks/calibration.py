"""How often the verdict is right on the trainings of `benchmarks.calibration_runs`, and where its thresholds come from.

python -m benchmarks.calibration RUNS.jsonl [--choose]

Thresholds are chosen on the first half of the seeds of two data sets, and the table is of all other runs: the other
half of the seeds, and a data set of which no run was chosen on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from attn_monitor.measure.run_history import RunHistory
from attn_monitor.measure.verdict import THRESHOLDS, Thresholds, judge
from attn_monitor.measurements import MetricKey, Verdict
from benchmarks.calibration_kinds import KINDS, PROTOTYPES

CHOSEN_ON = ("digits", "photographs")
GOOD = tuple(kind for kind in KINDS if kind.endswith("healthy"))
GRID: dict[str, tuple[float, ...]] = {
    "snapshots": (4, 3, 2),
    "same": (0.005, 0.01, 0.015, 0.02),
    "uniform": (0.99, 0.98, 0.97, 0.95),
    "cosine": (0.98, 0.95, 0.9, 0.85),
    "rank": (0.15, 0.2, 0.25, 0.3, 0.4),
    "loss": (0.3, 0.2, 0.1, 0.05),
    "low_entropy": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    "alike": (0.9, 0.6, 0.3, 0.1),
    "swing": (1.5, 1.0, 0.8, 0.6, 0.4),
}
"""Values to choose among, the strictest first, which is taken of equally good ones."""
SMOOTH = 10  # steps over which a loss is averaged


class Judged(NamedTuple):
    """A run and the verdict at each of its snapshots."""

    run: dict[str, Any]
    verdicts: list[tuple[int, Verdict]]

    @property
    def alarm(self) -> int | None:
        """Step of the first bad verdict, which raises a flag; None if there is none."""
        return next((step for step, verdict in self.verdicts if verdict.is_bad), None)


def history_of(run: dict[str, Any]) -> Iterator[tuple[int, dict[MetricKey, float]]]:
    """The metrics of each snapshot."""
    keys = {tag: MetricKey.from_tag(tag) for tag in run["metrics"]}
    for index, step in enumerate(run["steps"]):
        values = {tag: line[index] for tag, line in run["metrics"].items()}
        yield step, {k: v for tag, k in keys.items() if k is not None and (v := values[tag]) is not None}


def judged(run: dict[str, Any], thresholds: Thresholds = THRESHOLDS) -> Judged:
    """Judge a run at each of its snapshots, as in training."""
    history, verdicts = RunHistory(), []
    for step, metrics in history_of(run):
        history.add(step, metrics)
        verdicts.append((step, judge(history, thresholds)))
    return Judged(run, verdicts)


def loss_shows(run: dict[str, Any]) -> int | None:
    """First step at which one can see from this loss alone that something is wrong; None if it looks well to its end.

    It is not finite, a tenth above what it began with, or within 1 % of ln K for 20 steps.
    """
    line, stands = smooth(run["losses"]), 0
    for step, value in enumerate(line):
        stands = stands + 1 if abs(value / math.log(PROTOTYPES) - 1) < 0.01 else 0
        if not math.isfinite(value) or (step >= SMOOTH and value > 1.1 * line[SMOOTH - 1]) or stands >= 20:
            return step
    return None


def smooth(losses: Sequence[float | None]) -> list[float]:
    """Average of the latest steps."""
    line = [math.inf if loss is None else loss for loss in losses]
    return [
        sum(line[max(0, i - SMOOTH + 1) : i + 1]) / len(line[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(line))
    ]


def halves(runs: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split into runs to choose thresholds on, and runs to report."""
    runs = list(runs)
    half = (max(run["seed"] for run in runs) + 1) / 2
    chosen_on = [run for run in runs if run["data"] in CHOSEN_ON and run["seed"] < half]
    return chosen_on, [run for run in runs if run not in chosen_on]


def score(runs: Sequence[dict[str, Any]], thresholds: Thresholds) -> tuple[float, float]:
    """Return (false alarms, detection), shares; detection is the mean over kinds of faults."""
    kinds: dict[str, list[bool]] = {}
    for run in runs:
        kinds.setdefault(run["kind"], []).append(judged(run, thresholds).alarm is not None)
    good = [alarm for kind in GOOD for alarm in kinds.pop(kind, [])]
    return sum(good) / max(1, len(good)), sum(sum(a) / len(a) for a in kinds.values()) / max(1, len(kinds))


def choose(runs: Sequence[dict[str, Any]], start: Thresholds = THRESHOLDS) -> Thresholds:
    """Choose thresholds one after another, twice: no false alarm first, then as many faults as possible."""
    best = start
    for _ in range(2):
        for name, values in GRID.items():

            def cost(value: float, name: str = name, best: Thresholds = best) -> tuple[float, float]:
                wrong, found = score(runs, replace(best, **{name: value}))
                return wrong, -found

            best = replace(best, **{name: min(values, key=cost)})
    return best


def table(runs: Sequence[dict[str, Any]], thresholds: Thresholds) -> str:
    """A row for each kind of run, in Markdown."""
    rows = [
        "| run | alarms | first at step | verdict at the end | loss shows it | lead in steps | kNN |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in dict.fromkeys(run["kind"] for run in runs):
        found = [judged(run, thresholds) for run in runs if run["kind"] == kind]
        alarms = [j for j in found if j.alarm is not None]
        shown = [] if kind in GOOD else [(j.alarm, loss_shows(j.run)) for j in alarms]
        leads = [loss - alarm for alarm, loss in shown if loss is not None and alarm is not None]
        seen = sum(loss_shows(j.run) is not None for j in found)
        ends = Counter(j.verdicts[-1][1].state for j in found).most_common(3)
        knn = [median(j.run["knn"][i] for j in found) for i in (0, 1)]
        rows.append(
            f"| {kind} | {len(alarms)} of {len(found)} | {_median([j.alarm for j in alarms if j.alarm is not None])} | "
            f"{', '.join(f'{state} {count}' for state, count in ends)} | "
            f"{seen} of {len(found)} | {_median(leads)} | {knn[0]:.2f} → {knn[1]:.2f} |"
        )
    return "\n".join(rows)


def _median(values: Sequence[int]) -> str:
    return f"{median(values):.0f}" if values else ""


def main() -> None:
    """Print the table of the runs that thresholds were not chosen on, and the thresholds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--choose", action="store_true", help="choose thresholds first")
    given = parser.parse_args()
    chosen_on, reported = halves(map(json.loads, given.runs.read_text().splitlines()))
    thresholds = choose(chosen_on) if given.choose else THRESHOLDS
    print(thresholds)
    for title, runs in (("chosen on", chosen_on), ("reported", reported)):
        wrong, found = score(runs, thresholds)
        print(f"\n{title}: {len(runs)} runs, {wrong:.0%} false alarms, {found:.0%} of faults detected\n")
        print(table(runs, thresholds))


if __name__ == "__main__":
    main()
