"""Every file in configs/, started by the command in its first line, but for two steps, and read back."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from attn_monitor import load_snapshots
from tests.support import forked, wandb_runs
from tests.support.events import Events

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ENTROPY = "attn/teacher/layer3/entropy"
STEPS = [0, 1, 2]
EVERY_STEP = ("--trainer.callbacks.init_args.every_n_train_steps", "1")  # of the last callback


def command(config: Path) -> list[str]:
    """The command in the first line of a config, with paths that hold in any folder."""
    _, found, words = config.read_text().splitlines()[0].partition("python ")
    assert found, f"the first line of {config.name} shows no command"
    return [sys.executable, *(str(ROOT / w) if (ROOT / w).is_file() else w for w in shlex.split(words))]


def check_events(run: Path) -> None:
    events = Events(run)
    assert [step for step, _ in events.scalars(ENTROPY)] == STEPS
    assert [step for step, _ in events.images("attn_maps/1_coffee")] == STEPS


def check_tiny(runs: Path) -> Path:
    check_events(runs / "dino_tiny_cpu" / "version_0")
    return runs / "dino_tiny_cpu" / "version_0"


def check_tensorboard(runs: Path) -> Path:
    check_events(runs / "dino_tensorboard" / "version_0")
    return runs / "dino_tensorboard" / "version_0"


def check_wandb(runs: Path) -> Path:
    rows = wandb_runs.history(runs / "dino_wandb")
    for tag in (ENTROPY, "attn_maps/1_coffee"):
        assert [row["trainer/global_step"] for row in rows if tag in row] == STEPS
    return runs / "dino_wandb"


def check_mlflow(runs: Path) -> Path:
    # Run by itself, as importing mlflow warns of its own dependencies.
    code = f"""
from mlflow import MlflowClient
client = MlflowClient("sqlite:///{runs}/dino_mlflow/mlflow.db")
(run,) = client.search_runs([client.get_experiment_by_name("dino").experiment_id])
print(sorted(metric.step for metric in client.get_metric_history(run.info.run_id, "{ENTROPY}")))
images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
print(sum("attn_maps" in path and "coffee" in path and path.endswith(".png") for path in images))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=runs, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [str(STEPS), str(len(STEPS))]
    return runs / "dino_mlflow" / "version_0"


def check_csv(runs: Path) -> Path:
    with open(runs / "dino_csv" / "version_0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row[ENTROPY]] == STEPS
    return runs / "dino_csv" / "version_0"


def check_no_logger(runs: Path) -> Path:
    pictures = {path.name for path in (runs / "dino_no_logger" / "attn_monitor" / "pictures").iterdir()}
    assert {"attn_maps-1_coffee.jpg", "attn_filmstrip-1_coffee.jpg"} <= pictures
    return runs / "dino_no_logger"


CHECKS: dict[str, Callable[[Path], Path]] = {
    "dino_tiny_cpu": check_tiny,
    "dino_tensorboard": check_tensorboard,
    "dino_wandb": check_wandb,
    "dino_mlflow": check_mlflow,
    "dino_csv": check_csv,
    "dino_no_logger": check_no_logger,
}


def test_every_config_has_a_check() -> None:
    assert {config.stem for config in CONFIGS} == set(CHECKS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_the_first_line_names_the_config_itself_and_settings_are_below(config: Path) -> None:
    assert command(config)[-1] == str(config)
    settings = yaml.safe_load(config.read_text())
    assert settings.keys() <= {"seed_everything", "model", "data", "trainer"}
    assert "logger" in settings["trainer"]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_config_trains(config: Path, tmp_path: Path) -> None:
    quiet = {**wandb_runs.without_wandb(os.environ), "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    words = [*command(config), "--trainer.max_steps", "2", *EVERY_STEP]
    ran = forked.run(words, cwd=tmp_path, env=quiet, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "failed" not in ran.stderr
    run = CHECKS[config.stem](tmp_path / "runs")
    (archive,) = run.rglob("attn_monitor")  # on W&B beside what W&B keeps of the run
    assert [s.step for s in load_snapshots(archive)] == STEPS
    assert list(run.rglob("last.ckpt"))
    # Everything is in the run folder, and the report at the end says so.
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "cache"}
    assert f"logs are in {run.relative_to(tmp_path)}" in ran.stdout
    assert "head 0:" in ran.stdout
