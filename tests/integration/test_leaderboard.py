"""Many runs in one table, as text, as JSON and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from attn_monitor import AttentionSnapshot
from attn_monitor.commands import cli
from attn_monitor.errors import ArgumentError
from attn_monitor.measurements import HealthFlag, MetricKey, Metrics
from attn_monitor.offline import compare_many
from attn_monitor.record.archive import snapshot_path
from tests.support.runs import write_run

STEPS = tuple(range(100, 800, 100))
RISES, PEAKS, FALLS = (1, 2, 3, 4, 5, 6, 7.5), (1, 2, 5, 4, 3, 3, 2.5), (7, 6, 5, 4, 3, 2, 1)


def archive(folder: Path, course: Sequence[float], knn: float | None, flagged: bool = False) -> Path:
    """A teacher's run whose separability takes a course."""
    (first,) = write_run(folder / "attn_monitor", steps=(0,), sharpness=(0,), roles=("teacher",))
    (folder / "attn_monitor" / "step-000000000.npz").unlink()
    for step, value in zip(STEPS, course, strict=True):
        of_layer = {"dense_separability": value, "dense_spread": 0.5, "dense_rank": 0.25, "entropy": 1 / value}
        metrics = Metrics({MetricKey("teacher", 1, name): v for name, v in of_layer.items()})
        if knn is not None:
            metrics[MetricKey("teacher", None, "knn_accuracy")] = knn * value / max(course)
        flags = (HealthFlag("peak", "teacher", 1, (), step, None, "a finding"),) if flagged and step == 300 else ()
        AttentionSnapshot.of(replace(first, step=step, metrics=metrics, flags=flags)).save(
            snapshot_path(folder / "attn_monitor", step)
        )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        archive(folder / "rises", RISES, 0.5),
        archive(folder / "peaks<b>", PEAKS, 0.9, flagged=True),
        archive(folder / "falls", FALLS, None),
    ]


def test_runs_are_sorted_by_any_value(runs: list[Path]) -> None:
    def order(**choice: str) -> list[str]:
        return [row.archive.parent.name for row in compare_many(runs, **choice)]

    assert order() == order(sort="knn_accuracy") == ["rises", "peaks<b>", "falls"]
    assert order(sort="knn_accuracy", at="pick") == ["peaks<b>", "rises", "falls"]
    assert order(sort="pick") == ["rises", "falls", "peaks<b>"]
    assert order(sort="entropy") == ["falls", "peaks<b>", "rises"]
    with pytest.raises(ArgumentError, match="sort='speed': no run has this metric; expected one of dense_rank"):
        order(sort="speed")


def test_a_row_is_what_the_archive_holds(runs: list[Path]) -> None:
    peaks = next(row for row in compare_many(runs) if row.archive.parent.name == "peaks<b>")
    assert (peaks.role, peaks.flags, peaks.dense, peaks.at, peaks.steps) == ("teacher", 1, 300, 700, STEPS)
    assert peaks.pick == 5 - 0.5 + 0.25
    assert peaks.value("dense_separability") == 2.5
    at_pick = next(row for row in compare_many(runs, at="pick") if row.archive.parent.name == "peaks<b>")
    assert (at_pick.at, at_pick.value("dense_separability")) == (300, 5)


def test_the_command_prints_a_table_json_and_a_page(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new" / "page.html"
    cli.main(
        ["leaderboard", *map(str, runs), "--out", str(page), "--sort", "pick", "--metrics", "entropy,knn_accuracy"]
    )
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", head)[-3:] == ["pick", "entropy", "knn_accuracy"]
    assert [line.split()[0].rpartition("/")[2] for line in lines[:3]] == ["rises", "falls", "peaks<b>"]
    assert re.split(r"  +", lines[0])[-3:] == ["7.25", "0.133", "0.5"]
    assert lines[3] == str(page)
    text = page.read_text()
    manifest = json.loads(text.partition('id="manifest">')[2].partition("</script>")[0])
    assert manifest["list"] == {"columns": ["entropy", "knn_accuracy"], "at": "last"}
    assert [run["name"].rpartition("/")[2] for run in manifest["runs"]] == ["rises", "falls", "peaks<b>"]
    assert [run["found"]["dense"] for run in manifest["runs"]] == [700, 100, 300]
    assert [run["images"] for run in manifest["runs"]][1:] == [0, 0], "images that are the same are there once"
    assert "peaks<b>" not in text
    cli.main(["leaderboard", *map(str, runs), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told == [row.as_dict() for row in compare_many(runs)]
    assert told[0]["picks"]["dense"] == 700


def test_mistakes(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no run has 'speed'; expected all, or names among"):
        cli.main(["leaderboard", str(runs[0]), "--metrics", "speed"])
    with pytest.raises(SystemExit, match="does not exist"):
        cli.main(["leaderboard", str(runs[0]), str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        cli.main(["leaderboard"])
    assert ended.value.code == 2
