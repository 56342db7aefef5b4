"""The demo, as `make demo` starts it, but for a few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from attn_monitor import ProbeBatch, load_snapshots
from tests.support import forked
from tests.support.events import Events

ROOT = Path(__file__).resolve().parent.parent.parent


MASKS = ("--data.mask_folder", "runs/probe_masks", "--trainer.callbacks.init_args.probe.masks", "runs/probe_masks")


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples" / "train_dino.py", "--config", ROOT / "configs" / "dino_tiny_cpu.yaml"]
    return forked.run([*command, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_demo_logs_both_roles_from_the_first_step_to_the_last(tmp_path: Path) -> None:
    every = "--trainer.callbacks.init_args.every_n_train_steps", "1"
    ran = demo(tmp_path, "--trainer.max_steps", "12", *every, *MASKS)
    assert ran.returncode == 0, ran.stderr
    run = tmp_path / "runs" / "dino_tiny_cpu" / "version_0"
    snapshots = load_snapshots(run / "attn_monitor")
    assert [s.step for s in snapshots] == list(range(13))
    assert snapshots[0].roles == ("student", "teacher")
    assert snapshots[0].maps("teacher").shape == (6, 4, 16, 16)
    events = Events(run)
    assert len(events.images("attn_maps/1_coffee")) == 13
    assert len(events.scalars("attn/teacher/layer3/jaccard_best_head")) == 13
    truth = ProbeBatch.load(run / "attn_monitor" / "probe.npz").masks
    assert truth is not None
    objects = dict(zip(snapshots[0].names, truth.flatten(2).any(-1).sum(1).tolist(), strict=True))
    counts = {"0_flower": 2, "1_coffee": 2, "2_china": 1, "3_astronaut": 1, "4_motorcycle": 1, "5_rocket": 1}
    assert objects == counts
    for line in (
        "trained all 12 steps, in ",
        "; 13 snapshots, ",
        "logs are in runs",
        "tensorboard --logdir",
        "images=1000",
        "head 0:",
    ):
        assert line in ran.stdout
    assert ran.stdout.splitlines()[-1].strip() == str(run / "attn_monitor" / "report.html")


@pytest.mark.slow
def test_demo_takes_a_folder_of_images(tmp_path: Path, photographs: Path) -> None:
    former = tmp_path / "runs" / "probe_masks"
    former.mkdir(parents=True)
    Image.new("L", (128, 128), 1).save(former / "mine.png")  # not written by the demo: it stays, and is not used
    ran = demo(tmp_path, "--data", str(photographs), "--trainer.max_steps", "2", *MASKS)
    assert ran.returncode == 0, ran.stderr
    (archive,) = tmp_path.glob("runs/dino_tiny_cpu/version_*/attn_monitor")
    snapshot = load_snapshots(archive)[0]
    assert snapshot.names == ("0_astronaut", "1_chelsea", "2_coffee", "3_rocket")
    assert not [key for key in snapshot.metrics if "jaccard" in key.metric]  # nobody has drawn the objects of these
    assert (former / "mine.png").is_file()


def test_demo_names_a_missing_folder(tmp_path: Path) -> None:
    ran = demo(tmp_path, "--data", str(tmp_path / "nowhere"))
    assert ran.returncode == 1
    assert "nowhere" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_fabric_on_two_processes(tmp_path: Path) -> None:
    """Lightning Fabric starts two processes; the first one writes what both have seen."""
    command = [sys.executable, ROOT / "examples" / "fabric.py", "--steps", "4", "--every", "2", "--folder", "run"]
    ran = forked.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    snapshots = load_snapshots(tmp_path / "run" / "attn_monitor")
    assert [s.step for s in snapshots] == [0, 2, 4]
    assert snapshots[0].roles == ("student", "teacher")
    assert "coffee" in snapshots[0].names
    assert len(Events(tmp_path / "run").images("attn_maps/coffee")) == 3
    assert ran.stdout.count("logs are in run") == 1
