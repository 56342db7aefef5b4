"""Draw the charts of docs/reading-the-curves.md: `python docs/make_curves.py`.

Trains the demo twice, as it is and without the centring that keeps DINO from collapsing, and once for a hundred steps
at too high a learning rate, unless the runs are there.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from attn_monitor import AttentionSnapshot, ProbeBatch, load_snapshots
from attn_monitor.draw.canvas import GAP, HEADER, blank_picture, draw_text, paste, resize
from attn_monitor.draw.cells import color_cell
from attn_monitor.draw.strips import filmstrip
from attn_monitor.measurements import MetricKey
from attn_monitor.record.thinning import thin

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "curves"
RUNS = ROOT / "runs" / "curves"
BROKEN = ("--model.center_momentum", "1.0")  # the centre stays at zero
TOO_FAST = ("--model.lr", "0.02", "--model.warmup_steps", "40", "--trainer.max_steps", "100")
COLOURS = {"demo": "#1a7f8e", "without centring": "#d9541e"}
IMAGE = "1_coffee"
FEATURED, CELL = (
    ("1_coffee", "0_flower", "2_china", "6_chelsea"),
    96,
)  # images whose features are shown, and pixels of each

History = list[AttentionSnapshot]


def train(name: str, *changes: str) -> History:
    """A run of the demo with every metric of every layer, from its archive if it has been made before."""
    archive = RUNS / name / "attn_monitor"
    if not archive.is_dir():
        command = ["examples/train_dino.py", "--config", "configs/dino_tiny_cpu.yaml", "--config", "docs/curves.yaml"]
        version = ["--trainer.logger.init_args.version", name]
        subprocess.run([sys.executable, *command, *version, *changes], cwd=ROOT, check=True)
    return load_snapshots(archive)


def plot(axes: Axes, history: History, key: MetricKey, label: str, **style: Any) -> None:
    """One line over the steps at which the run has this metric."""
    points = [(s.step, s.metrics[key]) for s in history if key in s.metrics]
    axes.plot(*zip(*points, strict=True), label=label, **style)


def heads_and_mean(axes: Axes, runs: dict[str, History], metric: str, role: str, layer: int) -> None:
    """The mean as a thick line; each head as a thin one, where the metric has heads."""
    for name, history in runs.items():
        for key in (k for k in history[-1].metrics if k[:3] == (role, layer, metric) and k.head is not None):
            plot(axes, history, key, "_", color=COLOURS[name], linewidth=0.8, alpha=0.45)
        plot(axes, history, MetricKey(role, layer, metric), name, color=COLOURS[name], linewidth=2)


def distance(axes: Axes, history: History) -> None:
    """One line for each layer of the teacher, the deeper the darker."""
    layers = history[-1].layers_of("teacher")
    for layer in layers:
        style = {"color": COLOURS["demo"], "alpha": 0.25 + 0.75 * layer / layers[-1]}
        plot(axes, history, MetricKey("teacher", layer, "distance"), f"layer {layer}", **style)


def chart(file: str, label: str, draw: Callable[[Axes], None], *, log: bool = False) -> None:
    """A small chart with steps along the bottom."""
    figure, axes = plt.subplots(figsize=(5.2, 2.5), dpi=110, layout="constrained")
    draw(axes)
    axes.set_xlabel("step", fontsize=9)
    axes.set_title(label, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if log:
        axes.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=2 if len(axes.get_lines()) > 2 else 4, fontsize=8, frameon=False)
    figure.savefig(OUT / f"{file}.png")
    plt.close(figure)
    Image.open(OUT / f"{file}.png").convert("RGB").quantize(64).save(OUT / f"{file}.png", optimize=True)


def jaccard(axes: Axes, runs: dict[str, History], layer: int) -> None:
    """The two protocols side by side."""
    for name, history in runs.items():
        best, fixed = (MetricKey("teacher", layer, f"jaccard_{kind}_head") for kind in ("best", "fixed"))
        plot(axes, history, best, f"{name}, best head per object", color=COLOURS[name], linewidth=2)
        plot(axes, history, fixed, f"{name}, one head", color=COLOURS[name], linestyle="--")


def filmstrips(runs: dict[str, History], layer: int) -> None:
    """The same image in both runs."""
    probe = ProbeBatch.load(RUNS / "demo" / "attn_monitor" / "probe.npz")
    index = probe.names.index(IMAGE)
    for name, history in runs.items():
        strip = filmstrip(history, index, probe.pixels[index], layer=layer)
        Image.fromarray(strip).save(OUT / f"filmstrip-{name.replace(' ', '-')}.jpg", quality=80)


def features(runs: dict[str, History], layer: int) -> None:
    """Patch features of the student as colours: a row for each image, a column for each of eight steps."""
    probe = ProbeBatch.load(RUNS / "demo" / "attn_monitor" / "probe.npz")
    shown = [(probe.names.index(name), probe.pixels[probe.names.index(name)]) for name in FEATURED]
    for run, history in runs.items():
        steps = [history[i] for i in thin([s.step for s in history], 8)]
        picture = blank_picture((1 + len(steps)) * (CELL + GAP) + GAP, HEADER + len(shown) * (CELL + GAP))
        for row, (image, photo) in enumerate(shown):
            top = HEADER + row * (CELL + GAP)
            paste(picture, GAP, top, resize(photo, (CELL, CELL), Image.Resampling.LANCZOS))
            for column, snapshot in enumerate(steps, 1):
                attention = snapshot.layer("student", layer)
                assert attention.colors is not None
                colors = attention.colors[image].unflatten(0, attention.grid).numpy()
                paste(picture, GAP + column * (CELL + GAP), top, color_cell(colors, (CELL, CELL)))
        canvas = Image.fromarray(picture)
        for column, snapshot in enumerate(steps, 1):
            middle = GAP + column * (CELL + GAP) + CELL / 2
            draw_text(
                canvas, (middle, 8), f"step {snapshot.step}" if column == 1 else str(snapshot.step), 18, anchor="m"
            )
        canvas.save(OUT / f"features-{run.replace(' ', '-')}.jpg", quality=80)


def main() -> None:
    """Train what is missing, then draw everything."""
    runs = {"demo": train("demo"), "without centring": train("collapse", *BROKEN)}
    OUT.mkdir(exist_ok=True)
    last = runs["demo"][-1].layers_of("teacher")[-1]
    of_teacher: Sequence[tuple[str, str]] = (
        ("entropy", "entropy, teacher's last layer: mean (thick) and heads (thin)"),
        ("mask_area", "mask_area: share of patches that hold 60 % of the attention"),
        ("prefix_mass", "prefix_mass: attention on the CLS token itself"),
        ("peak", "peak: largest weight × number of patches"),
        ("outlier_fraction", "outlier_fraction: patch tokens of unusual norm"),
        ("head_divergence", "head_divergence: how different heads are"),
        ("cls_patch_cosine", "cls_patch_cosine: how alike CLS and patches are"),
        ("drift", "drift: change since the snapshot before"),
        ("gram_drift", "gram_drift: change of the patches' cosines since step 0"),
    )
    for metric, label in of_teacher:
        draw = partial(heads_and_mean, runs=runs, metric=metric, role="teacher", layer=last)
        chart(metric, label, draw, log=metric == "peak")
    for metric, label in (
        ("student_teacher_divergence", "student_teacher_divergence: how far the teacher lags"),
        ("mask_agreement", "mask_agreement: overlap of the student's and the teacher's masks"),
    ):
        chart(metric, label, partial(heads_and_mean, runs=runs, metric=metric, role="student", layer=last))
    chart("distance", "distance: pixels to what is attended, by layer", partial(distance, history=runs["demo"]))
    chart("jaccard", "jaccard: overlap with hand-drawn objects", partial(jaccard, runs=runs, layer=last))
    filmstrips(runs, last)
    features({"demo": runs["demo"], "collapsed": train("too-fast", *TOO_FAST)}, last)
    for name, history in runs.items():
        print(f"{name}: " + ("; ".join(str(f) for s in history for f in s.flags) or "no health flags"))


if __name__ == "__main__":
    main()
