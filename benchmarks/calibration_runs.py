"""Small trainings, healthy and with one fault each (`benchmarks.calibration_kinds`), for the verdict's thresholds.

python -m benchmarks.calibration_runs OUT.jsonl [--seeds 7]

A run takes some seconds on one core: a ViT of two layers on 24-pixel crops of scikit-learn's digits, of faces and
other cut-outs (`lfw_subset`), or of scikit-image's photographs. Metrics are those of a watched training: of the probe,
and of training's own forwards. A line of the file is one run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.background.failures import Failures
from attn_monitor.measure.label_probes import accuracy, ridge_predictions
from attn_monitor.train.training_watch import TrainingWatch
from benchmarks.calibration_images import crops, images_of
from benchmarks.calibration_kinds import DIM, KINDS, SIDE, STEPS, Recipe, training_of

EVERY, BATCH = 10, 16


def train(kind: str, data: str, seed: int) -> dict[str, Any]:
    """Train once, and return the metrics of all snapshots and the loss of all steps."""
    started, recipe = time.process_time(), KINDS[kind]
    torch.manual_seed(seed)
    images, labels = images_of(data)
    seen = len(images) if recipe.images is None else recipe.images
    first = 0 if recipe.images is None else seed * 7
    training = training_of(recipe)
    role = "teacher" if "teacher" in training.backbones else "backbone"
    watched = training.backbones[role]
    optimizer = torch.optim.AdamW(training.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    monitor = AttentionMonitor(ProbeBatch((images[:: len(images) // 8][:8, :, 6:30, 6:30] - 0.5) / 0.25))
    watch = TrainingWatch(Failures(), lambda text: None)
    before, snapshots, losses, dense = knn(watched, images, labels), [], [], []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                snapshot = monitor.snapshot({role: watched}, step=step, others=watch.values(step))
                snapshots.append(monitor.colored(snapshot))
            dense.append(of_patches(watched, images, labels))
            watch.watch_models(training.backbones, training.around, dict.fromkeys(training.backbones, True))
        if step == STEPS:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
            group["lr"] *= recipe.later if step >= recipe.patch_steps > 0 else 1.0
        chosen = first + torch.randint(seen, (BATCH,))
        views = [crops(images[chosen], SIDE), crops(images[chosen], SIDE)]
        watch.begin(step, (step // EVERY + 1) * EVERY, views)
        loss = training.loss(views, labels[chosen], step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters, 3.0)
        _step(optimizer, training.parameters, recipe)
        training.after()
        watch.end(loss)
        losses.append(float(loss.detach()))
    tags = sorted({key.tag for s in snapshots for key in s.metrics if key.head is None})
    return {
        "kind": kind,
        "data": data,
        "seed": seed,
        "steps": [s.step for s in snapshots],
        "metrics": {tag: [_rounded(s.metrics.get(tag)) for s in snapshots] for tag in tags},
        "flags": [f.state_dict() for s in snapshots for f in s.flags],
        "losses": [_rounded(loss) for loss in losses],
        "knn": [before, knn(watched, images, labels)],
        "dense": dense,
        "seconds": time.process_time() - started,
    }


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], recipe: Recipe) -> None:
    """Step; q and k go farther by their own factor."""
    both = [p[: 2 * DIM] for p in parameters if p.shape == (3 * DIM, DIM) and recipe.attention_lr != 1]
    before = [p.clone() for p in both]
    optimizer.step()
    for now, then in zip(both, before, strict=True):
        now += (recipe.attention_lr - 1) * (now - then)


@torch.no_grad()
def knn(model: nn.Module, images: Tensor, labels: Tensor, k: int = 5) -> float:
    """Share of images whose label most of their nearest neighbours have, among at most 400."""
    chosen = torch.linspace(0, len(images) - 1, min(400, len(images))).long()
    model.eval()
    z = model((images[chosen][:, :, 6:30, 6:30] - 0.5) / 0.25)
    model.train()
    z = nn.functional.normalize(z - 0.0, dim=1)
    nearest = (z @ z.T).fill_diagonal_(-2).topk(k, dim=1).indices
    return float((labels[chosen][nearest].mode(1).values == labels[chosen]).float().mean())


@torch.no_grad()
def of_patches(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy of a ridge probe that reads an image's label from each of its patches, on every second of 200 images."""
    chosen = torch.linspace(0, len(images) - 1, 200).long()
    model.eval()
    tokens = model.forward_features((images[chosen][:, :, 6:30, 6:30] - 0.5) / 0.25)[:, 1:]
    model.train()
    kinds = labels[chosen][:, None].expand(tokens.shape[:2])
    train, known, test, truth = (part[i::2].flatten(0, 1) for i in (0, 1) for part in (tokens, kinds))
    return accuracy(ridge_predictions(train, known, test), truth)


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _all(seeds: int) -> Iterator[tuple[str, str, int]]:
    """Yield all runs; the first ones hold every kind."""
    for seed in range(seeds):
        for data in ("digits", "photographs", "faces"):
            yield from ((kind, data, seed) for kind in KINDS)


def main() -> None:
    """Train all that the file does not hold yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration_runs", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*weight_norm. is deprecated")
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    done = {(run["kind"], run["data"], run["seed"]) for run in map(json.loads, lines)}
    for which in _all(given.seeds):
        if which not in done:
            run = train(*which)
            with given.out.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(*which, f"{run['seconds']:.1f} s, kNN {run['knn'][0]:.2f} -> {run['knn'][1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
