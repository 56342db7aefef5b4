"""Comet, ClearML, Aim, SwanLab and Trackio: what is read back of an offline run, or of the methods that one has.

The clients that need no older packages than the others come with the extra "dev"; the tests of the rest are run where
these are installed. Stand-ins have the signatures of the methods that are used, and are always tested.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attn_monitor.hugging_face import CURRENT_RUN, current_runs
from attn_monitor.trackers.events import Lines, Scalars
from attn_monitor.trackers.registry import tracker_for
from tests.support import forked, tracker_runs

PACKAGES = {"comet": "comet_ml", "clearml": "clearml", "aim": "aim", "swanlab": "swanlab", "trackio": "trackio"}


def run_of(tracker: str, folder: Path) -> dict[str, Any]:
    package = PACKAGES[tracker.removesuffix("_in_trainer")]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "tests.support.tracker_runs", tracker, str(folder)]
    root = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "default"}
    done = forked.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "failed" not in done.stderr
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert result.get("curve", result["logged"]) == result["logged"]
    assert result.get("page", result["report"]) == result["report"]
    assert result["said"] in str(result["text"])
    return result


@pytest.mark.slow
def test_comet(tmp_path: Path) -> None:
    result = run_of("comet", tmp_path)
    assert result["pictures"].count(["attn_maps/a", "JPEG"]) == 2
    assert {"video attn_timelapse.gif", "asset attn_sinks.csv", "asset attn_table.csv"} <= set(result["names"])
    assert "curve attn_heads_chart/teacher/layer1/head3" in result["names"]
    assert "histogram3d attn_histogram/student/layer0/entropy" in result["names"]
    assert result["ignored"].startswith("Comet gets no masks, layout, alert: ")


@pytest.mark.slow
def test_clearml_and_what_it_takes_from_tensorboard(tmp_path: Path) -> None:
    result = run_of("clearml", tmp_path)
    for name in ("", "-board"):
        assert result["pictures"].count([f"attn_maps{name}/a", "JPEG"]) == 2
    assert ["attn_timelapse/attn_timelapse", "GIF"] in result["pictures"]
    names = set(result["names"])
    assert {"plot attn_sinks/attn_sinks", "plot attn_histogram/teacher/layer1/entropy"} <= names
    assert "plot entropy per head, teacher, layer 1/head 3" in names
    scalars = {name.removeprefix("training_stats_scalar ") for name in names}
    assert {"attn_heads/teacher/layer1/entropy/head3", "attn/head_divergence/student/layer1"} <= scalars
    assert any("attn-board" in name and "entropy" in name for name in scalars)


@pytest.mark.slow
def test_aim(tmp_path: Path) -> None:
    result = run_of("aim", tmp_path)
    assert result["pictures"] == [["attn_maps/a", "jpeg", "a, step 0"], ["attn_maps/a", "jpeg", "a, step 1"]]
    assert {"images attn_overview/logits", "texts attn/health/verdict"} <= set(result["names"])
    assert "distributions attn_histogram/student/layer0/entropy" in result["names"]
    assert "nearly all attention" in result["alerts"][0]


@pytest.mark.slow
def test_swanlab(tmp_path: Path) -> None:
    result = run_of("swanlab", tmp_path)
    assert result["pictures"].count(["attn_maps/a", "JPEG"]) == 2
    assert ["attn_timelapse", "GIF"] in result["pictures"]
    assert {"attn_maps/a", "attn_sinks", "attn_table", "attn_heads_chart/teacher/layer1"} <= set(result["names"])
    assert any(len(chart.get("rowData", ())) == 2 * 2 * 4 for chart in result["charts"])  # roles, images, heads
    assert any(len(chart.get("series", ())) == 4 for chart in result["charts"])


@pytest.mark.slow
def test_trackio(tmp_path: Path) -> None:
    result = run_of("trackio", tmp_path)
    assert result["pictures"].count(["attn_maps/a", "JPEG"]) == 2
    assert ["attn_timelapse", "GIF"] in result["pictures"]
    assert {"trackio.table attn_table", "trackio.histogram attn_histogram/student/layer0/entropy"} <= set(
        result["names"]
    )
    (alert,) = result["alerts"]
    assert (alert["title"], alert["level"]) == ("attention health", "warn")


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["comet", "aim", "swanlab"])
def test_loggers_of_lightning_in_a_trainer(tracker: str, tmp_path: Path) -> None:
    """Attention logged late, by a thread, beside the loss: each of both at its own steps."""
    result = run_of(f"{tracker}_in_trainer", tmp_path)
    assert [step for step, _ in result["curve"]] == [0, 1, 2, 3, 4]
    assert result["loss"] == [0, 1, 2, 3]
    assert len([name for name, *_ in result["pictures"] if name == "attn_maps/image0"]) == 5


# Stand-ins


class Made:
    """Remembers what an object was made of."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.args, self.named = args, named
        self.rows: list[tuple[Any, ...]] = []

    def add(self, headers: list[str], rows: list[list[Any]]) -> Made:
        self.rows.append((headers, rows))
        return self

    def add_xaxis(self, values: list[str]) -> Made:
        self.rows.append(("x", values))
        return self

    def add_yaxis(self, name: str, values: list[float]) -> Made:
        self.rows.append((name, values))
        return self


class Tracks:
    def __init__(self) -> None:
        self.tracked: dict[tuple[str, int], Any] = {}
        self.warned: list[str] = []

    def track(self, value: Any, name: str, step: int) -> None:
        assert (name, step) not in self.tracked
        self.tracked[name, step] = value

    def log_warning(self, msg: str) -> None:
        self.warned.append(msg)


class Logs:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.alerts: list[tuple[str, str]] = []
        self.mode = "disabled"

    def log(self, data: dict[str, Any], step: int) -> None:
        for value in data.values():  # a file is there while it is logged
            if isinstance(value, Made) and value.args and str(value.args[0]).endswith((".jpg", ".gif")):
                value.args = (Path(value.args[0]).read_bytes(),)
        self.rows.append((step, data))

    def alert(self, title: str, text: str) -> None:
        self.alerts.append((title, text))

    def of(self, tag: str) -> list[tuple[int, Any]]:
        return [(step, row[tag]) for step, row in self.rows if tag in row]


MODULES = {
    "aim": SimpleNamespace(Image=Made, Distribution=Made, Text=Made),
    "swanlab": SimpleNamespace(
        Image=Made, Video=Made, Html=Made, Text=Made, echarts=SimpleNamespace(Table=Made, Line=Made)
    ),
    "trackio": SimpleNamespace(Image=Made, Video=Made, Html=Made, Table=Made, Histogram=Made, Markdown=Made),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs whose classes are of these packages, after a run that has been logged to all of them at once."""
    kinds = {"aim": Tracks, "swanlab": Logs, "trackio": Logs}
    runs = {name: type("Run", (kind,), {"__module__": f"{name}.sdk.run"})() for name, kind in kinds.items()}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, module in MODULES.items():
            patch.setitem(sys.modules, name, module)
        result = tracker_runs.publish(tmp_path_factory.mktemp("runs"), *runs.values())
    return {**runs, **result}


def test_methods_of_aim(stand_ins: dict[str, Any]) -> None:
    run = stand_ins["aim"]
    assert [(step, run.tracked[tracker_runs.CURVE, step]) for step in (0, 1)] == stand_ins["logged"]
    picture = run.tracked["attn_maps/a", 1]
    assert isinstance(picture.args[0], Image.Image)
    assert picture.named == {"caption": "a, step 1", "format": "jpeg"}
    assert run.tracked["attn_histogram/teacher/layer1/entropy", 0].args[0].ndim == 1
    assert "nearly all attention" in run.warned[0]


def test_methods_of_swanlab(stand_ins: dict[str, Any]) -> None:
    run = stand_ins["swanlab"]
    assert run.of(tracker_runs.CURVE) == stand_ins["logged"]
    assert [made.named["caption"] for _, made in run.of("attn_maps/a")] == ["a, step 0", "a, step 1"]
    assert run.of("attn_timelapse")[0][1].args[0].startswith(b"GIF8")
    ((_, table),) = run.of("attn_table")
    ((columns, rows),) = table.rows
    assert columns == ["image", "role", "layer", "head", "entropy", "mask area"]
    assert not any(isinstance(cell, np.ndarray) for row in rows for cell in row)
    ((_, lines),) = run.of("attn_heads_chart/teacher/layer1")
    assert [name for name, _ in lines.rows] == ["x", "head 0", "head 1", "head 2", "head 3"]
    assert tracker_for(run).run_folder is None


def test_methods_of_trackio(stand_ins: dict[str, Any]) -> None:
    run = stand_ins["trackio"]
    assert run.of(tracker_runs.CURVE) == stand_ins["logged"]
    assert [made.args[0][:2] for _, made in run.of("attn_maps/a")] == [b"\xff\xd8"] * 2, "JPEG"
    assert run.of("attn_timelapse")[0][1].args[0].startswith(b"GIF8")
    assert run.of("attn_report")[0][1].args == (tracker_runs.PAGE,)
    assert run.alerts == [("attention health", f"- {tracker_runs.FLAG}")]


def test_clearml_draws_no_0_for_nan() -> None:
    """Which would be a collapse, of entropy say."""
    points: list[tuple[Any, ...]] = []
    lines: list[list[tuple[int, float]]] = []
    methods = {
        "__module__": "clearml.logger",
        "report_scalar": lambda _, *point: points.append(point),
        "report_scatter2d": lambda _, title, series, line, step, **style: lines.append(line),
    }
    logger = type("Logger", (), methods)
    values = {"attn/student/layer1/entropy": math.nan, "attn/student/layer1/peak": math.inf, "attn/loss": 2.0}
    with tracker_for(logger()).batch(3) as log:
        log(Scalars("attn", lambda: values))
        log(
            Lines(
                "attn_heads_chart/student/layer1", lambda: ((0, 3), ((0.5, math.nan), (math.nan, math.nan))), "entropy"
            )
        )
    assert lines == [[(0, 0.5)]]
    assert points == [("attn", "loss", 2.0, 3)]


def test_what_each_does_not_take_is_named_once(stand_ins: dict[str, Any]) -> None:
    assert stand_ins["ignored"].split("; ")[0].startswith("Aim gets no masks, table, lines, layout, animation, page: ")
    assert "SwanLab gets no masks, histogram, layout, alert: " in stand_ins["ignored"]
    assert "Trackio gets no masks, lines, layout: " in stand_ins["ignored"]


# Hugging Face's report_to


def test_runs_that_transformers_has_opened_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {package: object() for package in CURRENT_RUN}
    packages: dict[str, Any] = {
        "wandb": SimpleNamespace(run=runs["wandb"]),
        "comet_ml": SimpleNamespace(get_running_experiment=lambda: runs["comet_ml"]),
        "clearml": SimpleNamespace(Task=SimpleNamespace(current_task=lambda: runs["clearml"])),
        "swanlab": SimpleNamespace(get_run=lambda: runs["swanlab"]),
        "trackio": SimpleNamespace(context_vars=SimpleNamespace(current_run=SimpleNamespace(get=lambda: None))),
    }
    for package, module in packages.items():
        monkeypatch.setitem(sys.modules, package, module)
    assert current_runs(list(packages)) == [runs[package] for package in packages if package != "trackio"]
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace())
    with pytest.warns(UserWarning, match="no run of swanlab is found, so it gets no attention maps"):
        assert current_runs(["swanlab"]) == []
