"""python -m benchmarks.pick_truth OUT.jsonl [--seconds 60]: what `attn-monitor pick` picks, next to the truth.

Five trainings of a tiny ViT on mosaics of scikit-image's textures and on scikit-learn's digits. At 24 checkpoints of
each, the score without labels is compared with what labels say: a ridge probe of patches on held-out mosaics, whose
masks are exact, and kNN of the CLS token on digits. A line of the file is one training; the table is printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from scipy.stats import kendalltau
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.commands.pick import Ranking, rank
from attn_monitor.measure.dense_quality import DENSE
from attn_monitor.measure.label_probes import accuracy, knn_predictions, ridge_predictions
from attn_monitor.measurements import MetricKey, Metrics

SIDE, PATCH, DIM, DEPTH, PROTOTYPES, BATCH, CHECKPOINTS = 32, 4, 48, 3, 256, 24, 24
LAST = DEPTH - 1
PROBES = (8, 64)  # images
RANKME = "RankMe"
TEXTURES = ("brick", "grass", "gravel", "immunohistochemistry", "page", "hubble_deep_field")


@dataclass(frozen=True)
class Recipe:
    """Settings of a training."""

    lr: float = 1e-3
    seed: int = 0
    centring: float = 0.9
    masked: bool = False


RUNS = {
    "DINO": Recipe(),
    "DINO, another seed": Recipe(seed=1),
    "DINO, learning rate × 10": Recipe(lr=1e-2),
    "DINO, no centring": Recipe(centring=1.0),
    "masked pixels": Recipe(masked=True),
}


@cache
def textures() -> tuple[Tensor, Tensor]:
    """Grey pictures of textures in halves, for training and for the test: (classes, 256, 128) each."""
    from skimage import data
    from skimage.color import rgb2gray
    from skimage.transform import resize

    pictures = [getattr(data, name)() for name in TEXTURES]
    grey = [resize(rgb2gray(p) if p.ndim == 3 else p / 255.0, (256, 256), anti_aliasing=True) for p in pictures]
    whole = torch.from_numpy(np.stack(grey)).float()
    return whole[..., :128], whole[..., 128:]


@cache
def mosaics(count: int, *, test: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32) of two to four regions of texture, and the class of each pixel.

    Regions have other brightness and contrast each, so that these tell nothing.
    """
    draw, halves = np.random.default_rng((seed, test)), textures()[test].numpy()
    rows, columns = np.mgrid[:SIDE, :SIDE]
    images, masks = np.zeros((count, SIDE, SIDE), np.float32), np.zeros((count, SIDE, SIDE), np.int64)
    for image, mask in zip(images, masks, strict=True):
        seeds = draw.uniform(0, SIDE, (draw.integers(2, 5), 2))
        region = ((rows - seeds[:, 0, None, None]) ** 2 + (columns - seeds[:, 1, None, None]) ** 2).argmin(0)
        for number in range(len(seeds)):
            kind, top, left = draw.integers(len(TEXTURES)), draw.integers(256 - SIDE), draw.integers(128 - SIDE)
            window = halves[kind, top : top + SIDE, left : left + SIDE]
            window = (window - window.mean()) / (window.std() + 1e-3) * draw.uniform(0.5, 1) + draw.uniform(-0.5, 0.5)
            image[region == number], mask[region == number] = window[region == number], kind
    return torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(masks)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, (1797, 3, 32, 32) with mean 0 and variance 1, and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    large = nn.functional.interpolate(images, SIDE, mode="bicubic", antialias=True)
    return ((large - large.mean()) / large.std()).expand(-1, 3, -1, -1), torch.from_numpy(found.target)


class Branch(nn.Module):
    """A backbone and its head."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.backbone = VisionTransformer(
            img_size=SIDE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=4, num_classes=0
        )
        out = nn.Linear(DIM, 3 * PATCH * PATCH)
        self.head = out if masked else DINOProjectionHead(DIM, 192, 64, PROTOTYPES, freeze_last_layer=0)


def views(images: Tensor) -> Tensor:
    """Random crops of a half to all of an image, flipped, with other brightness, contrast and noise."""
    n = len(images)
    side = torch.empty(n).uniform_(0.5, 1).sqrt()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side * torch.where(torch.rand(n) < 0.5, -1.0, 1.0), side
    theta[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * (1 - side)[:, None]
    found = nn.functional.grid_sample(
        images, nn.functional.affine_grid(theta, [n, 3, SIDE, SIDE], align_corners=False), align_corners=False
    )
    contrast, brightness = torch.empty(2, n, 1, 1, 1).uniform_(-0.4, 0.4)
    return found * (1 + contrast) + brightness + 0.1 * torch.randn(n, 1, SIDE, SIDE)


def masked_loss(branch: Branch, images: Tensor) -> Tensor:
    """Predict the pixels of half of the patches, which are greyed, from the others."""
    hidden = torch.rand(len(images), 1, SIDE // PATCH, SIDE // PATCH) < 0.5
    seen = images * ~hidden.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    target = nn.functional.unfold(images, PATCH, stride=PATCH).mT  # (B, N, 3 · 16)
    guess = branch.head(branch.backbone.forward_features(seen)[:, 1:])
    return (guess - target).square().mean(-1)[hidden.flatten(1)].mean()


def train(recipe: Recipe, seconds: float) -> list[tuple[int, nn.Module]]:
    """Train for some seconds of this core; return the teacher at each checkpoint, step 0 included."""
    torch.manual_seed(recipe.seed)
    student = Branch(recipe.masked)
    teacher = Branch(recipe.masked).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.lr, weight_decay=0.04)
    loss_of = DINOLoss(PROTOTYPES, teacher_temp=0.04, warmup_teacher_temp=0.04, center_momentum=recipe.centring)
    pool = torch.cat([mosaics(1500, test=False, seed=10)[0], digits()[0][:1000]])
    kept, step, started = [(0, copy.deepcopy(teacher.backbone))], 0, time.process_time()
    every = None
    while len(kept) <= CHECKPOINTS:
        batch = pool[torch.randint(len(pool), (BATCH,))]
        if recipe.masked:
            loss = masked_loss(student, batch)
        else:
            pair = [views(batch), views(batch)]
            answers = [teacher.head(teacher.backbone(view)) for view in pair]
            loss = loss_of(answers, [student.head(student.backbone(view)) for view in pair], epoch=0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1, (step + 1) / 50)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            for mean, new in zip(teacher.parameters(), student.parameters(), strict=True):
                mean.lerp_(new, 0.02)
        step += 1
        if step == 20:  # as many steps as fit
            every = max(2, round(seconds / ((time.process_time() - started) / 20) / CHECKPOINTS))
        if every is not None and step % every == 0:
            kept.append((step, copy.deepcopy(teacher.backbone)))
    return kept


@torch.no_grad()
def truth(backbone: Any) -> tuple[float, float, Tensor]:
    """Accuracy of a ridge probe of patches, of kNN on digits, and the features of mosaics, for RankMe."""
    tokens, kinds = [], []
    for test in (False, True):
        images, masks = mosaics(120, test=test, seed=20)
        tokens.append(backbone.forward_features(images)[:, 1:].flatten(0, 1))
        pixels = nn.functional.one_hot(masks, len(TEXTURES)).permute(0, 3, 1, 2).float()
        kinds.append(nn.functional.avg_pool2d(pixels, PATCH).flatten(2).argmax(1).flatten())
    dense = accuracy(ridge_predictions(tokens[0], kinds[0], tokens[1]), kinds[1])
    images, labels = digits()
    cls = torch.cat([backbone(part) for part in images[:1200].split(300)])
    knn = accuracy(knn_predictions(cls[:800], labels[:800], cls[800:]), labels[800:1200])
    return dense, knn, torch.cat([cls[:400], backbone(mosaics(400, test=False, seed=30)[0])])


def rankme(z: Tensor) -> float:
    """RankMe, arXiv 2210.02885."""
    values = torch.linalg.svdvals(z.double())
    shares = values / values.sum() + 1e-7
    return math.exp(float(-(shares * shares.log()).sum()))


def examine(name: str, recipe: Recipe, seconds: float) -> dict[str, Any]:
    """Train, measure each checkpoint as a watched run does, and by labels."""
    started = time.process_time()
    checkpoints = train(recipe, seconds)
    trained = time.process_time() - started
    monitors = {}
    for count in PROBES:
        images, _ = mosaics(count, test=False, seed=40)
        monitors[count] = AttentionMonitor(ProbeBatch(images, mean=(0.0,) * 3, std=(1.0,) * 3), metrics=["dense"])
    found: dict[int, dict[str, Any]] = {}
    for step, backbone in checkpoints:
        dense, knn, features = truth(backbone)
        found[step] = {"dense": dense, "global": knn, "rankme": rankme(features)}
        for count, monitor in monitors.items():
            snapshot = monitor.colored(monitor.snapshot({"teacher": backbone}, step=step))
            of_layer = snapshot.metrics.of_layer("teacher", LAST)
            found[step][f"DSE, {count} images"] = [of_layer[name] for name in DENSE]
    return {"run": name, "seconds": trained, "steps": found}


def rankings(result: dict[str, Any]) -> dict[str, Ranking]:
    """Rank the checkpoints of one training as `attn-monitor pick` does, by name of the score."""
    steps = {int(step): values for step, values in result["steps"].items() if int(step) > 0}
    of_dense = {}
    for name in (f"DSE, {count} images" for count in PROBES):
        of_dense[name] = {
            step: Metrics({MetricKey("teacher", LAST, n): v for n, v in zip(DENSE, values[name], strict=True)})
            for step, values in steps.items()
        }
    of_all = {step: Metrics({MetricKey("teacher", None, "rankme"): values["rankme"]}) for step, values in steps.items()}
    found = {name: rank(metrics)[0] for name, metrics in of_dense.items()}
    found |= {name.replace("DSE", "separability"): rank(metrics)[1] for name, metrics in of_dense.items()}
    return {**found, RANKME: rank(of_all)[0]}


def judged(ranking: Ranking, known: dict[int, float]) -> tuple[float, float, float, str]:
    """Return Kendall's τ with the truth, what the pick loses to the best and gains over the last, and a word."""
    values = [known[step] for step in ranking.steps]
    chosen = known[ranking.picks[0]]
    tau = float(kendalltau(ranking.scores, values)[0])
    return tau, max(values) - chosen, chosen - values[-1], ranking.certainty.partition(" (")[0].partition(":")[0]


def tables(results: list[dict[str, Any]]) -> str:
    """Return two tables in Markdown, of dense and of global use: a row for each training, and the means."""
    names = [name for name in rankings(results[0]) if name != RANKME]
    return f"{table(results, 'dense', names)}\n\n{table(results, 'global', [RANKME])}"


def table(results: list[dict[str, Any]], use: str, names: list[str]) -> str:
    """Return the table of one use, a column for each score."""
    lines = [
        f"| training | truth: start, best, last | τ of later is better | {' | '.join(names)} |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]
    numbers: list[list[tuple[float, ...]]] = []
    for result in results:
        known = {int(step): values[use] for step, values in result["steps"].items()}
        of_run = [judged(rankings(result)[name], known) for name in names]
        steps = [step for step in known if step > 0]
        best = max(steps, key=lambda step: known[step])
        later = float(kendalltau(steps, [known[step] for step in steps])[0])
        truths = f"{known[0]:.3f}, {known[best]:.3f} (step {best}), {known[steps[-1]]:.3f}"
        cells = [f"{tau:+.2f}; -{loss:.3f}; {gain:+.3f}; {word}" for tau, loss, gain, word in of_run]
        lines.append(f"| {result['run']} | {truths} | {later:+.2f} | {' | '.join(cells)} |")
        numbers.append([(later,), *(one[:3] for one in of_run)])
    later, *means = [np.mean(column, 0) for column in zip(*numbers, strict=True)]
    cells = [f"{tau:+.2f}; -{loss:.3f}; {gain:+.3f}" for tau, loss, gain in means]
    return "\n".join([*lines, f"| **mean** | | {later[0]:+.2f} | {' | '.join(cells)} |"])


def main() -> None:
    """Train and examine; trainings that the file has are not repeated."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pick_truth", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="of this core, for each training")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    for name, recipe in RUNS.items():
        if name not in {result["run"] for result in results}:
            result = examine(name, replace(recipe), given.seconds)
            with given.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            results.append(json.loads(json.dumps(result)))
    print(tables(results))


if __name__ == "__main__":
    main()
