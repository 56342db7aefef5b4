"""What computing metrics takes next to the forwards that they are made from: of a snapshot, and in training's steps."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from attn_monitor import AttentionRecorder
from attn_monitor.background.failures import Failures
from attn_monitor.measure.dense_quality import dense_metrics
from attn_monitor.measure.metrics import METRICS, measure, summarise
from attn_monitor.train.training_watch import TrainingWatch
from attn_monitor.train.weak_hooks import WeakHook
from benchmarks.measure import Spread, take_turns
from benchmarks.peers import Size, no_grad, timm_vit

THRESHOLD, PROTOTYPES = 0.6, 4096


def measure_metrics(size: Size, budget: float) -> Spread:
    """Time of all default metrics of two roles, drift and divergence included, over two plain forwards."""
    model, images = timm_vit(size), size.images()
    record = AttentionRecorder(model, layers="all", tokens=True)
    layers = {(role, a.layer): a for role in ("student", "teacher") for a in record(images)}
    before = {key: replace(a, rows=a.rows.flip(0)) for key, a in layers.items()}
    names = [name for name, metric in METRICS.items() if metric.default]
    forward = no_grad(model, images)

    def twice() -> None:
        forward()
        forward()

    def metrics() -> None:
        summarise(measure(layers, before, metrics=names, threshold=THRESHOLD))

    return take_turns({"forward": twice, "metrics": metrics}, budget=budget).ratio("metrics", "forward")


def measure_dense(size: Size, rounds: int) -> Spread:
    """Processor time of dense quality, of one role and in the thread that writes, over a plain forward of the probe."""
    model, images = timm_vit(size), size.images()
    (layer,) = AttentionRecorder(model, patches=True)(images)
    layers, forward = {("teacher", layer.layer): layer}, no_grad(model, images)
    shares = []
    for _ in range(rounds):
        began = time.thread_time()
        forward()
        between = time.thread_time()
        dense_metrics(layers)
        shares.append((time.thread_time() - between) / (between - began))
    return Spread.of(shares)


def measure_watched_step(size: Size, rounds: int) -> Spread:
    """Processor time of the hooks of `TrainingWatch` in a step of self-distillation, over that of the step."""
    images, parts = size.images(), [timm_vit(size) for _ in range(2)]
    heads = [nn.Sequential(nn.Linear(size.width, 256), nn.GELU(), nn.Linear(256, PROTOTYPES)) for _ in parts]
    (student, teacher), (ours, theirs) = parts, heads
    watch = TrainingWatch(Failures(), lambda text: None)
    watch.watch_models({"student": student, "teacher": teacher}, [*parts, *heads], {})
    hooked, plain = 0.0, WeakHook.__call__

    def timed(hook: WeakHook, *args: Any) -> None:
        nonlocal hooked
        started = time.thread_time()
        plain(hook, *args)
        hooked += time.thread_time() - started

    def step() -> None:
        with torch.no_grad():
            targets = theirs(teacher(images)).softmax(-1)
        nn.functional.cross_entropy(ours(student(images)), targets).backward()

    shares = []
    with patch.object(WeakHook, "__call__", timed):
        for number in range(rounds + 1):  # the first step is not watched
            hooked, started = 0.0, time.thread_time()
            watch.begin(number, None, [images])
            hooked += time.thread_time() - started
            began = time.thread_time()
            step()
            took = time.thread_time() - began
            watch.end(None)
            shares.append(hooked / (took - hooked))
    watch.stop()
    return Spread.of(shares[1:])
