"""Weights & Biases in depth: the axis in every kind of run, resumed runs, checkpoints as artifacts, media per step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import nn

from attn_monitor import AttentionMapCallback, AttentionMonitor, ProbeBatch, load_snapshots
from attn_monitor import functional as F
from attn_monitor.trackers.publisher import Publisher
from tests.support import wandb_runs
from tests.support.helpers import Distillation, loader, tiny_vit, trainer

AXIS = "trainer/global_step"
ENTROPY = "attn/teacher/layer1/entropy"

pytestmark = [
    pytest.mark.slow,
    # W&B's own: deprecations in its dependencies, and files that its service process closes late.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def fit(folder: Path, logger: WandbLogger, *callbacks: Any, **changes: Any) -> None:
    watch = AttentionMapCallback(num_images=2, every_n_train_steps=1, on_error="raise")
    settings = {"max_steps": 4, "ckpt_path": None, **changes}
    checkpoint = settings.pop("ckpt_path")
    running = trainer(folder, watch, *callbacks, logger=logger, **settings)
    running.fit(Distillation(), loader(), loader(8), ckpt_path=checkpoint)
    logger.experiment.finish()


def steps(rows: list[dict[str, Any]], tag: str) -> list[int]:
    return [row[AXIS] for row in rows if tag in row]


def by_lightning(folder: Path) -> str:
    fit(folder, WandbLogger(project="test", save_dir=folder, offline=True))
    return ENTROPY


def by_lightning_with_prefix(folder: Path) -> str:
    fit(folder, WandbLogger(project="test", save_dir=folder, offline=True, prefix="mine"))
    return f"mine-{ENTROPY}"


def by_lightning_in_a_running_run(folder: Path) -> str:
    import wandb

    wandb.init(project="test", dir=folder)
    with pytest.warns(UserWarning, match="already in progress"):
        fit(folder, WandbLogger(project="test", save_dir=folder, offline=True))
    return ENTROPY


def by_lightning_behind_tensorboard(folder: Path) -> str:
    fit(folder, WandbLogger(project="test", save_dir=folder, offline=True, sync_tensorboard=True))
    return ENTROPY


def by_a_plain_run(folder: Path) -> str:
    import wandb

    run = wandb.init(project="test", dir=folder)
    models = {role: tiny_vit() for role in ("student", "teacher")}
    monitor = AttentionMonitor(ProbeBatch(torch.randn(2, 3, 32, 32)))
    publisher = Publisher([run], monitor.probe)
    for step in range(5):
        publisher.publish(monitor.snapshot(models, step=step))
        run.log({"loss": 1.0, AXIS: step})
    assert monitor.previous is not None
    publisher.close()
    run.finish()
    return ENTROPY


KINDS = (
    by_lightning,
    by_lightning_with_prefix,
    by_lightning_in_a_running_run,
    by_lightning_behind_tensorboard,
    by_a_plain_run,
)


@pytest.mark.parametrize("train", KINDS, ids=lambda train: train.__name__)
def test_everything_is_drawn_over_the_global_step(
    offline: Path,
    train: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import wandb

    wandb.teardown()  # what tests before it have set up is silent
    monkeypatch.setenv("WANDB_SILENT", "false")
    tag = train(offline)
    assert wandb_runs.axes(offline)["attn*"] == AXIS
    rows = wandb_runs.history(offline)
    for name in (tag, "attn_maps/image0", "attn_filmstrip/image1", "attn_overlay/image0"):
        assert steps(rows, name) == [0, 1, 2, 3, 4], name
    assert steps(rows, "attn_table") == [4]
    assert all(AXIS in row for row in rows if any("attn" in key for key in row))
    own = [row["_step"] for row in rows]
    assert own == sorted(set(own))
    said = "".join(capfd.readouterr())
    assert "Tracking run" in said  # it does speak
    assert not [line for line in said.splitlines() if "WARNING" in line and "step" in line]


def test_prefixed_metrics_have_the_axis_too(offline: Path) -> None:
    by_lightning_with_prefix(offline)
    assert wandb_runs.axes(offline)["mine-attn*"] == AXIS


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
def test_a_resumed_run_goes_on(offline: Path) -> None:
    """Two processes' worth of one run: same id, same images, no step twice and none missing, one archive."""
    for last in (4, 8):
        saved = ModelCheckpoint(offline / "ckpt", save_last=True, every_n_train_steps=4)
        logger = WandbLogger(project="test", save_dir=offline, offline=True, id="one", resume="allow")
        checkpoint = offline / "ckpt" / "last.ckpt" if last == 8 else None
        fit(offline, logger, saved, max_steps=last, enable_checkpointing=True, ckpt_path=checkpoint)
    first, second = (wandb_runs.records(part) for part in wandb_runs.parts(offline))
    for found in (first, second):
        (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
        assert run.run_id == "one"
    rows = [row for part in wandb_runs.parts(offline) for row in wandb_runs.history(part)]
    for tag in (ENTROPY, "attn_maps/image0", "attn_overlay/image1"):
        assert steps(rows, tag) == list(range(9)), tag
    assert steps(rows, "attn_filmstrip/image0") == [0, 1, 2, 3, 4, 5, 8]
    assert steps(rows, "attn/teacher/layer1/drift") == list(range(1, 9))
    assert steps(rows, "attn_table") == [4, 8]
    (archive,) = offline.rglob("attn_monitor")
    assert [s.step for s in load_snapshots(archive)] == list(range(9))


def artifacts(folder: Path) -> list[Any]:
    return [r.artifact for r in wandb_runs.records(folder) if r.WhichOneof("record_type") == "artifact"]


@pytest.mark.parametrize("log_model", [True, "all"])
def test_checkpoints_chosen_by_attention_are_logged_as_artifacts(
    offline: Path, log_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(offline / "data"))
    best = ModelCheckpoint(offline / "best", monitor=ENTROPY, mode="min", every_n_train_steps=1, save_top_k=2)
    logger = WandbLogger(project="test", save_dir=offline, log_model=log_model)  # offline by the environment
    fit(offline, logger, best, enable_checkpointing=True)
    (archive,) = offline.rglob("attn_monitor")
    entropies = {s.metrics[ENTROPY] for s in load_snapshots(archive)}
    logged = [a for a in artifacts(offline) if a.type == "model"]
    scores = [json.loads(a.metadata)["score"] for a in logged]
    assert len(scores) == (2 if log_model is True else len(set(scores)))
    assert len(scores) >= 2
    for artifact, score in zip(logged, scores, strict=True):
        assert any(score == pytest.approx(entropy, abs=1e-6) for entropy in entropies)
        assert json.loads(artifact.metadata)["ModelCheckpoint"]["monitor"] == ENTROPY
    assert min(scores) == pytest.approx(float(best.best_model_score))
    rows = wandb_runs.history(offline)
    assert steps(rows, "attn_maps/image0") == [0, 1, 2, 3, 4]


def media(row: dict[str, Any]) -> int:
    """How many files a row brings, the masks of a picture counted one by one."""
    values = [value for value in row.values() if isinstance(value, dict) and "_type" in value]
    return len(values) + sum(len(value.get("masks", {})) for value in values)


def test_a_step_has_less_than_fifty_media(offline: Path) -> None:
    """W&B's own advice, held by default with eight images, two roles and twelve heads."""
    module = Distillation(embed_dim=48, num_heads=12)
    module.head = nn.Linear(48, 8)
    logger = WandbLogger(project="test", save_dir=offline, offline=True)
    watch = AttentionMapCallback(on_error="raise")
    trainer(offline, watch, logger=logger, max_steps=2).fit(module, loader(batch_size=8))
    logger.experiment.finish()
    per_step = dict.fromkeys(range(3), 0)
    for row in wandb_runs.history(offline):
        # One table with a thumbnail in each line is one thing to look at.
        per_step[row[AXIS]] += media({key: value for key, value in row.items() if not key.startswith("attn_table")})
    assert watch.monitor is not None
    assert len(watch.monitor.probe) == 8
    assert all(8 + 8 + 2 * 13 <= count < 50 for count in per_step.values()), per_step


def test_the_table_has_the_mask_area_of_the_pictures(offline: Path) -> None:
    """At the run's own threshold, and not at the usual one."""
    watch = AttentionMapCallback(num_images=2, threshold=0.9)
    logger = WandbLogger(project="test", save_dir=offline, offline=True)
    trainer(offline, watch, logger=logger, max_steps=2).fit(Distillation(), loader(), loader(8))
    logger.experiment.finish()
    (file,) = offline.rglob("attn_table*.table.json")
    table = json.loads(file.read_text())
    areas = {tuple(row[:4]): row[table["columns"].index("mask area")] for row in table["data"]}
    assert watch.monitor is not None
    last = watch.monitor.previous
    assert last is not None
    assert len(areas) == 2 * 2 * 4
    for (image, role, layer, head), area in areas.items():
        p = last.maps(role, layer)[last.names.index(image), head].flatten()
        assert area == pytest.approx(float(F.mask_area(p, 0.9)))
        assert area != pytest.approx(float(F.mask_area(p, 0.6)))
