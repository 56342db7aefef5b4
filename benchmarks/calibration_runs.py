"""Small DINO and MAE trainings, healthy and with one fault each, for the verdict's thresholds.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.background.failures import Failures
from attn_monitor.train.training_watch import TrainingWatch

STEPS, EVERY, BATCH, SIDE, DIM, PROTOTYPES = 100, 10, 16, 24, 48, 128


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; each fault changes one of them."""

    lr: float = 5e-4
    momentum: float = 0.99
    weight_decay: float = 0.04
    teacher_temperature: float = 0.02
    centring: float = 0.9
    head: torch.dtype = torch.float32
    images: int | None = None
    masked: bool = False


HEALTHY = Recipe()
KINDS = {
    "healthy": HEALTHY,
    "no centring": replace(HEALTHY, centring=1.0),
    "teacher = student": replace(HEALTHY, momentum=0.0),
    "temperature 1": replace(HEALTHY, teacher_temperature=1.0),
    "learning rate x 10": replace(HEALTHY, lr=5e-3),
    "momentum 0.5": replace(HEALTHY, momentum=0.5),
    "bf16 head": replace(HEALTHY, head=torch.bfloat16),
    "no weight decay": replace(HEALTHY, weight_decay=0.0),
    "one image": replace(HEALTHY, images=1),
    "MAE, healthy": replace(HEALTHY, masked=True),
}


@cache
def images_of(data: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 36, 36) in 0…1 of a data set, and their labels (n,)."""
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = torch.from_numpy(digits.images / 16.0), torch.from_numpy(digits.target)
    elif data == "faces":
        from skimage.data import lfw_subset

        images, labels = torch.from_numpy(lfw_subset()), (torch.arange(200) >= 100).long()
    else:
        return _windows()
    rgb = images.float()[:, None].expand(-1, 3, -1, -1)
    return nn.functional.interpolate(rgb, 36, mode="bicubic", antialias=True).clamp(0, 1), labels


def _windows() -> tuple[Tensor, Tensor]:
    """Cut windows out of photographs; a label is the photograph."""
    from skimage import data

    draw, found, labels = np.random.default_rng(0), [], []
    for label, photo in enumerate((data.astronaut, data.chelsea, data.coffee, data.rocket, data.immunohistochemistry)):
        image = torch.from_numpy(photo()).permute(2, 0, 1)[None].float() / 255
        image = nn.functional.interpolate(image, 96, mode="bilinear", antialias=True)
        for _ in range(120):
            top, left = draw.integers(0, 96 - 36, 2)
            found.append(image[0, :, top : top + 36, left : left + 36])
            labels.append(label)
    return torch.stack(found), torch.tensor(labels)


def crops(images: Tensor, size: int) -> Tensor:
    """Random crops of most of an image, flipped and with other brightness and contrast."""
    n = len(images)
    side = torch.empty(n).uniform_(0.7, 1.0).sqrt()
    shift = (torch.rand(n, 2) * 2 - 1) * (1 - side)[:, None]
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * flip, side, shift
    grid = nn.functional.affine_grid(theta, [n, 3, size, size], align_corners=False)
    found = nn.functional.grid_sample(images, grid, align_corners=False)
    contrast, brightness = torch.empty(2, n, 1, 1, 1).uniform_(-0.4, 0.4)
    return ((found - 0.5) * (1 + contrast) + brightness) / 0.25


class Branch(nn.Module):
    """A backbone and its projection head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = VisionTransformer(
            img_size=SIDE, patch_size=8, embed_dim=DIM, depth=2, num_heads=4, num_classes=0
        )
        _start(self.backbone)
        self.head = DINOProjectionHead(DIM, 96, 64, PROTOTYPES, freeze_last_layer=0).to(recipe.head)
        self.dtype = recipe.head

    def forward(self, images: Tensor) -> Tensor:
        """Outputs of the head, float32."""
        out: Tensor = self.head(self.backbone(images).to(self.dtype)).float()
        return out


def _start(backbone: nn.Module) -> None:
    """Initialise so that the CLS token depends on the image from the start: these runs are too short to learn that."""
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


class MAE(nn.Module):
    """Masked autoencoding: a quarter of the patches is seen, the others are predicted from them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = VisionTransformer(
            img_size=SIDE, patch_size=8, embed_dim=DIM, depth=2, num_heads=4, num_classes=0, patch_drop_rate=0.5
        )
        self.decoder = nn.Sequential(nn.Linear(DIM, 128), nn.GELU(), nn.Linear(128, 3 * SIDE * SIDE // 4))

    def forward(self, images: Tensor) -> Tensor:
        """The loss, on the whole image at half its size."""
        target = nn.functional.avg_pool2d(images, 2).flatten(1)
        return (self.decoder(self.backbone(images)) - target).square().mean()


def train(kind: str, data: str, seed: int) -> dict[str, Any]:
    """Train once, and return the metrics of all snapshots and the loss of all steps."""
    started, recipe = time.process_time(), KINDS[kind]
    torch.manual_seed(seed)
    images, labels = images_of(data)
    seen = images if recipe.images is None else images[seed * 7 : seed * 7 + recipe.images]
    models, step_loss, parameters = (_mae if recipe.masked else _dino)(recipe)
    teacher = models["backbones"].get("teacher") or models["backbones"]["backbone"]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    probe = ProbeBatch((images[:: len(images) // 8][:8, :, 6:30, 6:30] - 0.5) / 0.25)
    monitor = AttentionMonitor(probe, features=False)
    watch = TrainingWatch(Failures(), lambda text: None)
    before, snapshots, losses = knn(teacher, images, labels), [], []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                snapshot = monitor.snapshot({"teacher": teacher}, step=step, others=watch.values(step))
            snapshots.append(snapshot)
            watch.follow(models["backbones"], models["around"], dict.fromkeys(models["backbones"], True))
        if step == STEPS:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        batch = seen[torch.randint(len(seen), (BATCH,))]
        views = [crops(batch, SIDE), crops(batch, SIDE)]
        watch.begin(step, (step // EVERY + 1) * EVERY, views)
        loss = step_loss(views)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        models["after"]()
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
        "knn": [before, knn(teacher, images, labels)],
        "seconds": time.process_time() - started,
    }


def _dino(recipe: Recipe) -> tuple[dict[str, Any], Callable[[list[Tensor]], Tensor], list[Tensor]]:
    student, teacher = Branch(recipe), Branch(recipe)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    criterion = DINOLoss(PROTOTYPES, warmup_teacher_temp_epochs=0, center_momentum=recipe.centring)

    def loss(views: list[Tensor]) -> Tensor:
        both = torch.cat(views[:2])
        with torch.no_grad():
            targets = list(teacher(both).chunk(2))
        found: Tensor = criterion(targets, list(student(both).chunk(2)), teacher_temp=recipe.teacher_temperature)
        return found

    @torch.no_grad()
    def follow() -> None:
        for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            theirs.lerp_(ours, 1 - recipe.momentum)

    models = {"student": student.backbone, "teacher": teacher.backbone}
    return (
        {"backbones": models, "around": [student, teacher, criterion], "after": follow},
        loss,
        [p for p in student.parameters() if p.requires_grad],
    )


def _mae(recipe: Recipe) -> tuple[dict[str, Any], Callable[[list[Tensor]], Tensor], list[Tensor]]:
    model = MAE()
    models = {"backbones": {"backbone": model.backbone}, "around": [model], "after": lambda: None}
    return models, lambda views: model(views[0]), list(model.parameters())


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
