"""What `attn-monitor pick` says of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attn_monitor import ArchiveError, AttentionSnapshot
from attn_monitor.commands import cli
from attn_monitor.measurements import MetricKey, Metrics
from attn_monitor.offline import pick_checkpoints
from attn_monitor.record.archive import snapshot_path
from tests.support.runs import write_run

STEPS = (0, *range(100, 1100, 100))
COURSE = (9.0, 1.0, 2.0, 3.0, 2.0, 1.0, 1.5, 4.0, 3.0, 2.5, 2.0)  # best at 700, then 300; step 0 is above both


def archive(folder: Path, roles: Sequence[str] = ("student", "teacher"), **curves: Sequence[float]) -> Path:
    """Snapshots of one model whose metrics are made up; the student's are half of the teacher's."""
    (first,) = write_run(folder, steps=(0,), sharpness=(0,), roles=roles)
    for step, *values in zip(STEPS, *curves.values(), strict=True):
        metrics = Metrics(
            {
                MetricKey(role, 1, name): value * (0.5 if role == "student" else 1)
                for role in roles
                for name, value in zip(curves, values, strict=True)
            }
        )
        AttentionSnapshot.of(replace(first, step=step, metrics=metrics)).save(snapshot_path(folder, step))
    return folder


def dense(course: Sequence[float]) -> dict[str, Sequence[float]]:
    return {"dense_separability": course, "dense_spread": [0.5] * len(course), "dense_rank": [0.3] * len(course)}


def test_the_best_teacher_is_picked_and_named_as_anchor(tmp_path: Path) -> None:
    found = pick_checkpoints(archive(tmp_path, **dense(COURSE), rankme=COURSE[::-1]))
    assert [(r.use, r.role, r.measure) for r in found.rankings] == [
        ("dense", "teacher", "DSE"),
        ("dense", "student", "DSE"),
        ("dense", "teacher", "dense_separability"),
        ("global", "teacher", "rankme"),
        ("global", "student", "rankme"),
    ]
    best = found.best("dense")
    assert best.picks == (700, 300)
    assert found.anchor == 700
    assert best.steps == STEPS[1:], "a model that has learnt nothing is none to pick"
    assert best.gap(700) == pytest.approx((best.score(700) - best.score(1000)) / (best.noise * 2**0.5))
    assert found.best("global").picks[0] == 1000
    assert found.best("global").certainty == "the last checkpoint is the best"
    assert pick_checkpoints(tmp_path, start=0).anchor == 0


@pytest.mark.parametrize(
    ("course", "certainty"),
    [
        ([0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0], "clear"),
        ([0, 3, 1, 3, 1, 3.5, 1, 3, 1, 3, 1], "not certain: the last one may be as good"),
    ],
)
def test_certainty_is_the_gap_in_noise(tmp_path: Path, course: Sequence[float], certainty: str) -> None:
    wobble = [value + 0.05 * (-1) ** i for i, value in enumerate(course)]
    assert pick_checkpoints(archive(tmp_path, **dense(wobble))).best("dense").certainty.startswith(certainty)


def test_labels_come_before_rankme(tmp_path: Path) -> None:
    found = pick_checkpoints(archive(tmp_path, ("backbone",), rankme=COURSE, knn_accuracy=COURSE[::-1]))
    assert [(r.use, r.measure) for r in found.rankings] == [("global", "knn_accuracy")]
    assert found.anchor is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive(tmp_path / "run", **dense(COURSE))
    (tmp_path / "checkpoints").mkdir()
    for step in (0, 680, 1000):
        torch.save({}, tmp_path / "checkpoints" / f"epoch=0-step={step}.ckpt")
    words = ["pick", str(tmp_path / "run")]
    cli.main([*words, "--checkpoints", str(tmp_path / "checkpoints")])
    said = capsys.readouterr()
    assert "teacher for dense use, by DSE of 10 checkpoints, steps 100 to 1,000: likely" in said.out
    assert "epoch=0-step=680.ckpt (of step 680)" in said.out
    assert said.out.endswith("Anchor Gram matrices to the teacher of step 700.\n")
    assert "no ranking for global use" in said.err
    cli.main([*words, "--json"])
    assert json.loads(capsys.readouterr().out) == pick_checkpoints(tmp_path / "run").as_dict()


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive(tmp_path / "run", entropy=COURSE)
    with pytest.raises(ArchiveError, match=r"no snapshot from step 1 on has a metric to rank by \(dense_separability"):
        pick_checkpoints(tmp_path / "run")
    with pytest.raises(SystemExit, match="attn-monitor: probe: is missing"):
        cli.main(["pick", str(tmp_path), "--model", "timm:x"])
    with pytest.raises(SystemExit, match="does not exist"):
        cli.main(["pick", str(tmp_path / "nowhere")])
    few = archive(tmp_path / "few", **dense(COURSE))
    assert pick_checkpoints(few, start=800).best("dense").certainty.startswith("too few to choose: 3 checkpoints")
