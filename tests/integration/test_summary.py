"""What `attn-monitor summary` says of a run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attn_monitor import ArchiveError, HealthLimits
from attn_monitor.commands import cli
from attn_monitor.commands.summary import sparkline, summary
from attn_monitor.commands.support.run_summary import BEST, summarise_run
from attn_monitor.measurements import HealthFlag, Metrics
from attn_monitor.record.archive import snapshot_path
from tests.support.runs import write_run


def test_curves_are_the_metrics_of_the_snapshots(tmp_path: Path) -> None:
    snapshots = write_run(tmp_path)
    found = summarise_run(tmp_path)
    assert found.steps == (0, 10, 20, 30)
    assert [(layer.role, layer.layer) for layer in found.layers] == [("student", 1), ("teacher", 1)]
    for layer in found.layers:
        for curve in layer.curves:
            expected = {
                s.step: s.metrics.of_layer(layer.role, 1)[curve.metric]
                for s in snapshots
                if curve.metric != "drift" or s.step
            }
            assert dict(curve.points) == expected
            values = np.array(list(expected.values()))
            assert (curve.first.value, curve.last.value) == (values[0], values[-1])
            assert curve.low == (list(expected)[values.argmin()], values.min())
            assert curve.high == (list(expected)[values.argmax()], values.max())
            assert (curve.best is not None) == (curve.metric in BEST)
            if curve.metric == "outlier_fraction":
                assert curve.best == curve.low


def test_the_verdict_tells_when_it_turned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "attn_monitor", health=HealthLimits(peak=0.1, logit=math.inf))
    judged, flags, student, _ = summarise_run(tmp_path).verdict
    assert judged == "No verdict yet."  # four snapshots are no evidence
    assert flags.startswith("2 health flags were raised, the first at step 10 (peak, student, layer 1)")
    assert student.startswith("student, layer 1: entropy fell from 1.00 to 0.")
    assert student.endswith(", and rose to 1.00 since.")
    assert "at step 10," in student or "at step 20," in student
    summary(str(tmp_path))
    said = capsys.readouterr().out
    assert f"{tmp_path / 'attn_monitor'}: 4 snapshots, steps 0 to 30" in said
    assert "  peak: student, layer 1, heads" in said
    assert "student VisionTransformer, layer 1 (blocks.1.attn): 4 heads, 4 × 4 patches, query cls" in said
    (entropy, _) = (line for line in said.splitlines() if line.startswith("  entropy"))
    assert entropy.endswith(("█▁▁█", "█▁▂█", "█▂▁█"))


@pytest.mark.parametrize(("end", "text"), [(0, "stayed at 1.00 (near uniform)"), (6, "fell from 1.00 to 0.")])
def test_the_verdict_without_a_turn(tmp_path: Path, end: float, text: str) -> None:
    write_run(tmp_path, sharpness=(0, end / 3, end / 2, end), roles=["backbone"])
    _, *verdict = summarise_run(tmp_path).verdict
    assert verdict[0].startswith("No health flag was raised." if end == 0 else "One health flag was raised, the first")
    assert text in verdict[1]
    assert "since" not in verdict[1]


def test_one_snapshot_is_no_course(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, [1000], sharpness=[0], roles=["backbone"])
    summary(str(tmp_path))
    said = capsys.readouterr().out
    assert f"{tmp_path}: step 1,000 alone\n" in said
    assert "backbone, layer 1: entropy is 1.00 at step 1,000, the only one.\n" in said


def test_all_layers_on_one_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, layers="all")
    summary(str(tmp_path))
    few = capsys.readouterr().out
    summary(str(tmp_path), every_layer=True)
    every = capsys.readouterr().out
    assert few.count("  entropy") == every.count("  entropy") == 4
    assert few.count("  mask_area") == 2
    assert every.count("  mask_area") == 4


def test_json_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    cli.main(["summary", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    found = summarise_run(tmp_path)
    assert told["verdict"] == found.verdict
    assert told["steps"] == [0, 10, 20, 30]
    assert told["layers"][1]["role"] == "teacher"
    entropy = told["layers"][0]["metrics"]["entropy"]
    assert entropy["values"] == [p.value for p in found.layers[0].curves[0].points]
    assert entropy["best"] is None
    assert told["layers"][0]["metrics"]["outlier_fraction"]["best"]["is"] == "lowest"


def test_which_archive_is_meant(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no snapshots \(step-\*\.npz\) here; expected the attn_monitor folder"
    ):
        summarise_run(tmp_path)
    first = tmp_path / "version_0" / "attn_monitor"
    write_run(first, [0], sharpness=[0], roles=["backbone"])
    (first / "superseded-1").mkdir()
    (first / "step-000000000.npz").rename(first / "superseded-1" / "step-000000000.npz")
    with pytest.raises(FileNotFoundError):
        summarise_run(tmp_path / "version_0")
    (first / "superseded-1" / "step-000000000.npz").rename(first / "step-000000000.npz")
    assert summarise_run(tmp_path).archive == summarise_run(first).archive == first
    shutil.copytree(first, first.parent / "attn_monitor-early")
    with pytest.raises(ArchiveError, match=r"2 archives are here; choose one of .*attn_monitor, .*attn_monitor-early"):
        summarise_run(tmp_path / "version_0")


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_broken_snapshot_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], json_wanted: bool
) -> None:
    write_run(tmp_path)
    (tmp_path / "step-000000010.npz").write_bytes(b"damaged")
    with pytest.raises(ArchiveError, match=r"the summary is without .*step-000000010\.npz: the file is not readable"):
        summary(str(tmp_path), json=json_wanted)
    said = capsys.readouterr().out
    assert json.loads(said)["steps"] == [0, 20, 30] if json_wanted else "3 snapshots, steps 0 to 30" in said
    for path in tmp_path.glob("step*"):
        path.write_bytes(b"damaged")
    with pytest.raises(ArchiveError, match="no snapshot can be read"):
        summarise_run(tmp_path)


def test_layers_without_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snapshot,) = write_run(tmp_path, (0,), sharpness=(0,))
    metrics = Metrics({k: math.nan if k.role == "teacher" else v for k, v in snapshot.metrics.items()})
    spoilt = {k: replace(a, rows=a.rows * math.nan) if k[0] == "teacher" else a for k, a in snapshot.layers.items()}
    flags = (HealthFlag("nan", "teacher", 1, (0,), 0, None, "attention holds NaN"),)
    replace(snapshot, layers=spoilt, metrics=metrics, flags=flags, flags_raised=1).save(snapshot_path(tmp_path, 0))
    summary(str(tmp_path))
    assert "nan: teacher, layer 1" in capsys.readouterr().out


def test_sparklines() -> None:
    assert sparkline([0, 1, 0.5]) == "▁█▅"
    assert sparkline([2, 2]) == "▁▁"
