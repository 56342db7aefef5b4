"""A user's program: mypy --strict and pyright read it against the installed wheel, see wheel.py. It is not run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import assert_type

from attn_monitor import (
    AttentionMapCallback,
    AttentionMonitor,
    AttentionSnapshot,
    DrawingOptions,
    HealthLimits,
    LayerAttention,
    MetricKey,
    MetricOptions,
    ProbeBatch,
    ProbeOptions,
    Watch,
    find_backbones,
    functional,
    load_snapshots,
    record_attention,
)
from attn_monitor.offline import compare_runs, load_model, summarise_run


def watch_a_training(images: Tensor) -> pl.Trainer:
    """Options, callbacks and a Trainer."""
    probe = ProbeOptions("photos", masks="masks", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    first = AttentionMapCallback(probe, drawing=DrawingOptions(scale="minmax", heads=(0, 3)), health=HealthLimits())
    second = AttentionMapCallback(images, layers="all", metrics=MetricOptions(["entropy"]), name="all")
    assert_type(first.monitor, "AttentionMonitor | None")
    return pl.Trainer(callbacks=[first, second])


def watch_a_loop(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """A loop of one's own."""
    with Watch({"student": student, "teacher": teacher}, images, folder=Path("runs")) as watch:
        assert_type(watch.step(0), "AttentionSnapshot | None")


def look_at_a_model(model: nn.Module, images: Tensor) -> Tensor:
    """Rows, a snapshot, and numbers of them."""
    layers = record_attention(model, images)
    assert_type(layers[0], LayerAttention)
    snapshot = AttentionMonitor(ProbeBatch(images)).snapshot({"backbone": model}, step=0)
    assert_type(snapshot.metrics[MetricKey("backbone", 3, "entropy", None)], float)
    assert_type(find_backbones(model), dict[str, str])
    return functional.entropy(layers[0].maps.flatten(2))


def look_at_a_run() -> list[AttentionSnapshot]:
    """Files of a run that has ended."""
    print(summarise_run("runs/a").verdict, compare_runs("runs/a", Path("runs/b")).table())
    assert_type(load_model("timm:vit_tiny_patch16_224", weights=False), nn.Module)
    return load_snapshots("runs/a/attn_monitor")
