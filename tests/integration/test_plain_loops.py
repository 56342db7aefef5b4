"""The examples without Lightning, started as a user starts them, and what they wrote."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from attn_monitor import load_snapshots
from tests.support import forked, wandb_runs
from tests.support.events import Events

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
STEPS = [0, 2, 4, 5]


def run(example: str, folder: Path, *options: str) -> Path:
    """Five steps with a snapshot every two; the folder with the results."""
    out = folder / "out"
    command = [sys.executable, EXAMPLES / example, "--steps", "5", "--every", "2", "--folder", out, *options]
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(folder / "cache")}
    offline = {**wandb_runs.without_wandb(os.environ), **settings}
    ran = forked.run(command, cwd=folder, env=offline, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"logs are in {out}" in ran.stdout
    assert "Warning: attn_monitor" not in ran.stderr
    assert "failed" not in ran.stderr
    return out


@pytest.mark.slow
def test_plain_pytorch_with_a_summary_writer(tmp_path: Path) -> None:
    out = run("plain_pytorch.py", tmp_path)
    events = Events(out)
    assert [step for step, _ in events.scalars("attn/teacher/layer3/entropy")] == STEPS
    assert [step for step, _ in events.images("attn_maps/coffee")] == STEPS
    assert len(events.encoded("attn_timelapse")) == 1
    snapshots = load_snapshots(out / "attn_monitor")
    assert [s.step for s in snapshots] == STEPS
    assert snapshots[0].roles == ("student", "teacher")
    assert snapshots[0].maps("teacher").shape == (8, 4, 16, 16)
    # The same weights at first; then the student is ahead of its average.
    assert (snapshots[0].maps("student") == snapshots[0].maps("teacher")).all()
    assert (snapshots[-1].maps("student") != snapshots[-1].maps("teacher")).any()


@pytest.mark.slow
def test_plain_pytorch_with_a_wandb_run(tmp_path: Path) -> None:
    rows = wandb_runs.history(run("plain_pytorch.py", tmp_path, "--wandb"))
    step = "trainer/global_step"
    for tag in ("attn/teacher/layer3/entropy", "attn_maps/coffee"):
        assert [row[step] for row in rows if tag in row] == STEPS
    assert sum("attn_table" in row for row in rows) == 1


@pytest.mark.slow
def test_plain_pytorch_with_only_the_archive(tmp_path: Path) -> None:
    out = run("plain_pytorch.py", tmp_path, "--archive-only")
    assert [path.name for path in out.iterdir()] == ["attn_monitor"]
    assert [s.step for s in load_snapshots(out / "attn_monitor")] == STEPS
    assert (out / "attn_monitor" / "pictures" / "attn_filmstrip-coffee.jpg").is_file()


@pytest.mark.slow
def test_hugging_face_trainer(tmp_path: Path) -> None:
    out = run("hf_trainer.py", tmp_path)
    (losses,) = {path.parent for path in (out / "runs").glob("*/events*")}
    assert [step for step, _ in Events(losses).scalars("train/loss")] == [2, 4]
    events = Events(out / "runs")
    assert [step for step, _ in events.scalars("attn/backbone/layer3/entropy")] == STEPS
    assert [step for step, _ in events.images("attn_maps/coffee")] == STEPS
    assert len(events.encoded("attn_timelapse")) == 1
    snapshots = load_snapshots(out / "attn_monitor")
    assert [s.step for s in snapshots] == STEPS
    assert snapshots[0].maps("backbone").shape == (8, 4, 12, 12)
    assert (snapshots[0].maps("backbone") != snapshots[-1].maps("backbone")).any()


def test_the_examples_are_short() -> None:
    """Three lines are about attention in the loop, and one in the Trainer."""
    plain, hugging_face = ((EXAMPLES / name).read_text() for name in ("plain_pytorch.py", "hf_trainer.py"))
    assert plain.count("watch") == 3
    assert hugging_face.count("AttentionMapTrainerCallback(") == 1
    assert len(plain.splitlines()) <= 110
    assert len(hugging_face.splitlines()) <= 85
