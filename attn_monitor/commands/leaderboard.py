"""Compare many runs in one table: verdict, what to keep, and metrics, sorted by any of them.

Values are those of each run's last snapshot, or with --at pick of the one that `attn-monitor pick` chooses for dense
use. A page holds the same table, to be sorted by a click, the curves of all runs on top of each other, and each run's
player, which a click on its name or its pick opens.

Example: attn-monitor leaderboard runs/* --sort knn_accuracy --out leaderboard.html
"""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from attn_monitor.commands.pick import GLOBAL, Picked, pick_checkpoints
from attn_monitor.commands.support.results import notify, print_path, print_table, writing_to
from attn_monitor.commands.support.run_summary import RunSummary, summarise_run
from attn_monitor.errors import ArchiveError, ArgumentError
from attn_monitor.measure.dense_quality import DENSE, RANK, SEPARABILITY, SPREAD
from attn_monitor.measurements import finite_or_none
from attn_monitor.player.page import page_of_runs
from attn_monitor.player.report import FILE_BYTES, contents_within, names_of, write_whole

Line = Sequence[tuple[int, float]]
"""Points (step, value) in order of steps."""

PICK = "pick"
"""The column of the dense pick: separability - spread + rank there, which unlike pick's own score compares runs."""

SHOWN = ("knn_accuracy", "ridge_accuracy", "rankme", SEPARABILITY, "entropy", "loss")
"""Metrics of a table unless others are named; those that no run has are left out."""

TITLES = ("run", "last step", "verdict", "flags", "for dense use", "for global use")

LOWER_IS_BETTER = ("loss", SPREAD, "outlier_fraction", "mean_cosine", "gram_drift", "koleo")


@dataclass(frozen=True)
class Row:
    """A run in the table.

    Attributes:
        name: of the run, as short as tells it from the others.
        archive: its folder.
        steps: of its snapshots.
        role: whose metrics are shown: the teacher's where there is one.
        verdict: "healthy", or what is wrong.
        flags: how many health flags were raised.
        dense: step of the pick for dense use, None without one.
        certainty: of that pick.
        best: step of the pick for global use, None without one.
        pick: separability - spread + rank at the dense pick, NaN without one.
        at: the step that ``values`` are of.
        values: metrics by name, of the role's last layer, of its whole model and of training.
        curves: the same over steps.
    """

    name: str
    archive: Path
    steps: tuple[int, ...]
    role: str
    verdict: str
    flags: int
    dense: int | None
    certainty: str
    best: int | None
    pick: float
    at: int
    values: dict[str, float]
    curves: dict[str, Line]

    def value(self, column: str) -> float:
        """Return a metric, or the value of the column "pick"; NaN where the run has none."""
        return self.pick if column == PICK else self.values.get(column, math.nan)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without curves."""
        values = {name: finite_or_none(value) for name, value in self.values.items()}
        picks = {"dense": self.dense, "certainty": self.certainty, "global": self.best, PICK: finite_or_none(self.pick)}
        facts = {"run": self.name, "archive": str(self.archive), "snapshots": len(self.steps), "last": self.steps[-1]}
        judged = {"role": self.role, "verdict": self.verdict, "flags": self.flags}
        return {**facts, **judged, "picks": picks, "at": self.at, "metrics": values}


def compare_many(
    runs: Sequence[str | Path], *, sort: str | None = None, at: Literal["last", "pick"] = "last", start: int = 1
) -> list[Row]:
    """Compare runs, the best first.

    Args:
        runs: archives, or log directories that hold one.
        sort: a metric, or "pick" for the dense pick; None is the first of these that any run has: kNN accuracy, pick,
            RankMe. More is better, but of the loss and the like.
        at: whether metrics are those of the last snapshot or of the dense pick.
        start: the first step to pick, as in `pick_checkpoints`.

    Returns:
        A row for each run; those without the value that is sorted by come last.

    Raises:
        FileNotFoundError: a run has no snapshots.
        ArgumentError: no run has the metric to sort by.
        ArchiveError: no snapshot of a run can be read.
    """
    if at not in ("last", "pick"):
        raise ArgumentError(f'at={at!r}: expected "last" or "pick"')
    summaries = list({(found := summarise_run(run)).archive.resolve(): found for run in runs}.values())
    names = names_of([summary.archive for summary in summaries])
    rows = [_row(name, summary, at, start) for name, summary in zip(names, summaries, strict=True)]
    known = {metric for row in rows for metric in row.values} | {PICK}
    if sort is not None and sort not in known:
        raise ArgumentError(f"sort={sort!r}: no run has this metric; expected one of {', '.join(sorted(known))}")
    by = sort or next((m for m in (GLOBAL[0], PICK, GLOBAL[1]) if any(_there(row, m) for row in rows)), PICK)
    sign = 1 if by in LOWER_IS_BETTER else -1
    return sorted(rows, key=lambda row: (not _there(row, by), sign * row.value(by) if _there(row, by) else 0))


def leaderboard(
    runs: list[str],
    *,
    sort: str | None = None,
    at: Literal["last", "pick"] = "last",
    metrics: str | None = None,
    start: int = 1,
    out: str | None = None,
    json: bool = False,
) -> None:
    """Run `attn-monitor leaderboard`, which this module describes.

    Args:
        runs: archives of runs, or the log directories that hold them.
        sort: a metric to sort by, or "pick"; by default kNN accuracy, else the dense pick, else RankMe.
        at: last or pick; the snapshot that metrics are of.
        metrics: names of the metrics to show, joined by commas, or all.
        start: the first step to pick; 0 for runs that continue a trained model.
        out: an HTML page to write, with the table, overlaid curves and every run's player, in about 8 MB.
        json: print JSON, for scripts.
    """
    rows = compare_many(runs, sort=sort, at=at, start=start)
    columns = _columns(rows, metrics, sort)
    if json:
        print(jsonlib.dumps([row.as_dict() for row in rows], indent=1))
    else:
        texts = [(*_cells(row), *(_number(row.value(c)) for c in (PICK, *columns))) for row in rows]
        print_table([(*TITLES, PICK, *columns), *texts])
    if out is not None:
        path = Path(out)
        keep = [{step for step in (row.dense, row.best) if step is not None} for row in rows]
        contents = contents_within([(row.name, row.archive) for row in rows], FILE_BYTES, keep)
        for run, row in zip(contents, rows, strict=True):
            run.found = {"verdict": row.verdict, **row.as_dict()["picks"]}
        with writing_to(path.parent):
            write_whole(path, page_of_runs(contents, listed={"columns": columns, "at": at}))
        print_path(path)
    _note_differences(rows)


def _row(name: str, summary: RunSummary, at: str, start: int) -> Row:
    role = "teacher" if any(layer.role == "teacher" for layer in summary.layers) else summary.layers[-1].role
    own = [layer for layer in summary.layers if layer.role == role][-1]
    models = [model.curves for model in summary.models if model.role in (role, "training")]
    curves: dict[str, Line] = {
        curve.metric: [(point.step, point.value) for point in curve.points]
        for part in (*models, own.curves)
        for curve in part
    }
    picked = _picked(summary.archive, start)
    dense = None if picked is None else next((r for r in picked.rankings if (r.use, r.role) == ("dense", role)), None)
    best = None if picked is None else next((r for r in picked.rankings if (r.use, r.role) == ("global", role)), None)
    chosen = dense.picks[0] if dense is not None and dense.picks else None
    step = chosen if at == "pick" and chosen is not None else summary.steps[-1]
    of_pick = [math.nan if chosen is None else dict(curves[metric])[chosen] for metric in (SEPARABILITY, SPREAD, RANK)]
    return Row(
        name,
        summary.archive,
        summary.steps,
        role,
        str(summary.health.state),
        len(summary.flags),
        chosen,
        "" if dense is None else dense.certainty,
        best.picks[0] if best is not None and best.picks else None,
        of_pick[0] - of_pick[1] + of_pick[2],
        step,
        {metric: dict(line)[step] for metric, line in curves.items() if step in dict(line)},
        curves,
    )


def _picked(archive: Path, start: int) -> Picked | None:
    try:
        return pick_checkpoints(archive, start=start)
    except ArchiveError:  # nothing to rank by
        return None


def _columns(rows: Sequence[Row], metrics: str | None, sort: str | None) -> list[str]:
    known = list(dict.fromkeys(metric for row in rows for metric in row.values))
    if metrics == "all":
        return known
    wanted = list(SHOWN) if metrics is None else [name.strip() for name in metrics.split(",")]
    if metrics is not None and (unknown := [name for name in wanted if name not in known]):
        raise ArgumentError(f"metrics: no run has {unknown[0]!r}; expected all, or names among {', '.join(known)}")
    return list(dict.fromkeys(name for name in (*wanted, sort) if name in known))


def _cells(row: Row) -> list[str]:
    dense, best = ("" if step is None else f"{step:,}" for step in (row.dense, row.best))
    return [row.name, f"{row.steps[-1]:,}", row.verdict, str(row.flags), dense, best]


def _note_differences(rows: Sequence[Row]) -> None:
    """Say what makes values of runs incomparable."""
    lacking = [row.name for row in rows if not all(name in row.curves for name in DENSE)]
    if lacking:
        notify(f'without dense metrics, and so without a pick: {", ".join(lacking)}. Watch with the metric "dense"')


def _there(row: Row, column: str) -> bool:
    return math.isfinite(row.value(column))


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""
