"""Train the runs of docs/gallery.md and draw their pictures: `python docs/make_gallery.py [NAME ...]`.

Each is the first half of the demo with one thing changed, one to three minutes on two quiet cores, kept in
runs/gallery/NAME.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor, nn

from attn_monitor import AttentionSnapshot, DrawingOptions, MetricKey, ProbeBatch, load_snapshots
from attn_monitor.draw.strips import filmstrip
from attn_monitor.player.page import page_of_runs
from attn_monitor.player.report import contents_within, write_whole

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import train_dino  # noqa: E402  # in examples
from train_dino import ProgressLines  # noqa: E402, F401  # which the demo's settings look for in the program

PATCHES_UNTIL, LATER = 56, 8  # steps with a loss on patches, of dense-decay, and times the learning rate after them
FOLDER, OUT = ROOT / "runs" / "gallery", ROOT / "docs" / "gallery"
IMAGE, COLOURS = "0_flower", ("#1a7f8e", "#d9541e")  # of a healthy and a broken run
PAGES, PAGE_BYTES = ("healthy", "attention-collapsed", "dimensional-collapse"), 400_000  # those in the site
LAST, PROTOTYPES = 3, 512  # the last layer; prototypes of the demo
CURVES = {  # of up to two lines, the second dotted
    "loss": [MetricKey("training", None, "loss")],
    "attention entropy of the last layer (teacher)": [MetricKey("teacher", LAST, "entropy")],
    "max_logit of the last layer (student)": [MetricKey("student", LAST, "max_logit")],
    "effective_rank of features (teacher)": [MetricKey("teacher", None, "effective_rank")],
    "assignment entropy: each image, all (dotted)": [
        MetricKey("student", None, "assignment_entropy_each"),
        MetricKey("student", None, "assignment_entropy_mean"),
    ],
    "dense_separability of patches (teacher)": [MetricKey("teacher", LAST, "dense_separability")],
}


class FastQueriesAndKeys(train_dino.DINO):
    """Each step moves q and k a hundred times as far, as without normalisation a high learning rate does in the end."""

    def _queries_and_keys(self) -> list[Tensor]:
        qkv = [block.attn.qkv.weight.data for block in self.student_backbone.blocks]
        return [weight[: 2 * weight.shape[1]] for weight in qkv]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.before = [weight.clone() for weight in self._queries_and_keys()]

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        for now, then in zip(self._queries_and_keys(), self.before, strict=True):
            now += 99 * (now - then)
        super().on_train_batch_end(outputs, batch, batch_idx)


class OneDirection(train_dino.DINO):
    """A loss that reads one direction of the features: they need no other, and lose them."""

    def training_step(self, crops: list[Tensor], batch_idx: int) -> Tensor:
        both = torch.cat(crops[:2])
        with torch.no_grad():
            targets = self.teacher_backbone(both)
        features = self.student_backbone(both)
        away = (features - targets.roll(len(crops[0]), 0)).square().mean()
        spread = torch.relu(1 - (features.mean(1).var(0) + 1e-4).sqrt())
        loss: Tensor = away + spread
        self.log("train/loss", loss)
        return loss


class PatchesFirst(train_dino.DINO):
    """A loss that tells patches apart, beside a tenth of DINO's; then DINO's alone, at a higher learning rate."""

    def learning_rate(self) -> float:
        return super().learning_rate() * (LATER if self.global_step >= PATCHES_UNTIL else 1)

    def training_step(self, crops: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(crops, batch_idx)
        if self.global_step >= PATCHES_UNTIL:
            return loss
        with torch.no_grad():
            targets = patches(self.teacher_backbone, crops[0] * 1.1 + 0.1)
        found = patches(self.student_backbone, crops[0]) @ targets.T / 0.2
        return 0.1 * loss + nn.functional.cross_entropy(found, torch.arange(len(found)))


def patches(model: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens of all images at unit length, (images · patches, D)."""
    tokens: Tensor = model.forward_features(images)[:, 1:]
    return nn.functional.normalize(tokens.flatten(0, 1), dim=-1)


@dataclass(frozen=True)
class Run:
    """What differs from the demo."""

    changes: str = ""
    model: type[train_dino.DINO] = train_dino.DINO


RUNS = {
    "healthy": Run(),
    "answers-uniform": Run("--model.teacher_temp 1 --model.warmup_teacher_temp 1 --trainer.max_steps 96"),
    "attention-collapsed": Run(model=FastQueriesAndKeys),
    "dimensional-collapse": Run(model=OneDirection),
    "dense-decay": Run("--model.teacher_momentum 0.9 --trainer.max_steps 136", PatchesFirst),
    "diverging": Run("--model.lr 0.02 --model.min_lr 0.02 --model.teacher_momentum 0 --trainer.max_steps 96"),
}


def train(name: str) -> None:
    """Train, unless the run is there."""
    if not (FOLDER / name / "attn_monitor").is_dir():
        words = (
            f"--config configs/dino_tiny_cpu.yaml --config docs/gallery.yaml --trainer.logger.init_args.version {name}"
        )
        train_dino.main([*words.split(), *RUNS[name].changes.split()], RUNS[name].model)


def draw(name: str) -> None:
    """The picture of a run: six curves beside those of the healthy one, and an image over the steps."""
    history, healthy = (load_snapshots(FOLDER / one / "attn_monitor") for one in (name, "healthy"))
    figure, grid = plt.subplots(2, 3, figsize=(8.96, 3.6), dpi=100, layout="constrained")
    for axes, (title, lines) in zip(grid.flat, CURVES.items(), strict=True):
        for style, key in zip(("-", ":"), lines, strict=False):
            plot(axes, healthy, key, "grey", style)
            plot(axes, history, key, COLOURS[name != "healthy"], style)
        if since := next((s.step for s in history if s.verdict is not None and s.verdict.is_bad), None):
            axes.axvline(since, color="black", linewidth=0.8, linestyle="--")
        if title == "loss":
            axes.axhline(math.log(PROTOTYPES), color="black", linewidth=0.8, linestyle=":")
        if title.startswith("max_logit"):
            axes.set_yscale("log")
            axes.set_ylim(0.1, 1e5)
        elif "entropy" in title:
            axes.set_ylim(0, 1.02)
        axes.set_xlim(0, history[-1].step)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.canvas.draw()
    curves = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    probe = ProbeBatch.load(FOLDER / name / "attn_monitor" / "probe.npz")
    index = probe.names.index(IMAGE)
    strip = filmstrip(history, index, probe.pixels[index], options=DrawingOptions(heads=(0, 1)))
    picture = np.full((len(curves) + len(strip), max(curves.shape[1], strip.shape[1]), 3), 255, np.uint8)
    picture[: len(curves), : curves.shape[1]] = curves
    picture[len(curves) :, : strip.shape[1]] = strip
    Image.fromarray(picture).save(OUT / f"{name}.jpg", quality=75)


def plot(axes: Axes, history: Sequence[AttentionSnapshot], key: MetricKey, colour: str, style: str) -> None:
    """One line over the steps at which the run has this metric."""
    points = [(s.step, s.metrics[key]) for s in history if key in s.metrics]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.4)


def write_report(name: str) -> None:
    """The run's page, thinned to a few steps."""
    contents = contents_within([(name, FOLDER / name / "attn_monitor")], PAGE_BYTES)
    write_whole(OUT / f"{name}.html", page_of_runs(contents))


def main(names: Sequence[str]) -> None:
    OUT.mkdir(exist_ok=True)
    for name in dict.fromkeys(["healthy", *(names or RUNS)]):  # which all others are drawn beside
        train(name)
        draw(name)
        if name in PAGES:
            write_report(name)
        print(f"{name}: {load_snapshots(FOLDER / name / 'attn_monitor')[-1].verdict}")
        print(f"  {FOLDER / name / 'attn_monitor' / 'report.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
