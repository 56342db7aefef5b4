"""Draw max_logit, sinks and heat maps of docs/reading-the-curves.md: `python docs/make_divergence.py`.

Trains one small ViT twice, without q/k normalisation, to tell from a crop which photograph it is of: at a learning rate
that suits it, and at one that is too high. Prints when the health flag was raised and when the loss showed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from attn_monitor import AttentionMonitor, AttentionSnapshot, HealthFlag, ProbeBatch
from attn_monitor.draw.layer_heat_map import HEAT_SCALES, layer_heat_map
from attn_monitor.measurements import MetricKey
from attn_monitor.record.curves import Curves, Points
from attn_monitor.trackers.sink_table import COLUMNS, markdown, sink_rows

OUT = Path(__file__).resolve().parent / "curves"
FILES = "astronaut.png chelsea.png coffee.png rocket.jpg brick.png grass.png gravel.png coins.png moon.png page.png"
SIDE, CROP, BATCH = 128, 32, 32  # of photographs and crops in pixels; crops in a step
STEPS, WARM_UP, EVERY = 500, 400, 10
RATES = {"learning rate 0.003": 3e-3, "0.02, too high": 2e-2}
COLOURS = dict(zip(RATES, ("#1a7f8e", "#d9541e"), strict=True))
AVERAGE = 25  # steps that the loss is averaged over
LAYERS = 4


@dataclass
class Run:
    """The loss of every step, the health flags on logits, the curves of all layers and the last snapshot."""

    losses: list[float] = field(default_factory=list)
    flags: list[HealthFlag] = field(default_factory=list)
    curves: Curves = field(default_factory=Curves)
    last: AttentionSnapshot | None = None

    def layers(self, metric: str) -> list[Points]:
        """(step, value) of each layer."""
        return [self.curves.of([metric])[MetricKey("backbone", layer, metric)] for layer in range(LAYERS)]

    @property
    def averages(self) -> list[tuple[int, float]]:
        """(step, mean loss of the 25 steps up to it)."""
        ends = range(AVERAGE, len(self.losses) + 1, AVERAGE)
        return [(end, float(np.mean(self.losses[end - AVERAGE : end]))) for end in ends]

    @property
    def turned(self) -> int | None:
        """Step from which on the averaged loss stays above twice its smallest value; None where it ends below."""
        lowest = np.minimum.accumulate([loss for _, loss in self.averages])
        above = [loss > 2 * low for (_, loss), low in zip(self.averages, lowest, strict=True)]
        below = [step for (step, _), high in zip(self.averages, above, strict=True) if not high]
        return None if not above[-1] else below[-1] + AVERAGE


def photographs() -> Tensor:
    """(10, 3, 128, 128) of the scikit-image wheel, normalised."""
    folder = Path(skimage.data.__file__).parent
    opened = [Image.open(folder / name).convert("RGB").resize((SIDE, SIDE)) for name in FILES.split()]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in opened]))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.25


def crops(images: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops, and which photograph each is of."""
    labels = torch.randint(len(images), (count,), generator=generator)
    corners = torch.randint(SIDE - CROP, (count, 2), generator=generator).tolist()
    cut = [images[i, :, y : y + CROP, x : x + CROP] for i, (y, x) in zip(labels.tolist(), corners, strict=True)]
    return torch.stack(cut), labels


def train(rate: float) -> Run:
    """A run at one learning rate, after a linear warm-up."""
    torch.manual_seed(0)
    images, generator, run = photographs(), torch.Generator().manual_seed(0), Run()
    model = VisionTransformer(
        img_size=CROP, patch_size=4, embed_dim=64, depth=LAYERS, num_heads=4, num_classes=len(images)
    )
    probe = ProbeBatch(crops(images, 8, torch.Generator().manual_seed(1))[0])
    monitor = AttentionMonitor(probe, layers="all", metrics=["entropy", "max_logit", "sinks"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            run.last = monitor.snapshot({"backbone": model}, step=step)
            run.flags += [flag for flag in run.last.flags if flag.kind == "max_logit"]
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARM_UP)
        inputs, labels = crops(images, BATCH, generator)
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
    run.curves = monitor.curves
    return run


def draw_losses_and_logits(runs: dict[str, Run]) -> None:
    """The loss above, the logits of every layer below, on one axis of steps."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(5.2, 4.2), dpi=110, layout="constrained", sharex=True)
    for name, run in runs.items():
        above.plot(*zip(*run.averages, strict=True), color=COLOURS[name], label=name)
        _plot_layers(below, run, "max_logit", COLOURS[name])
        if run.flags:
            _mark((above, below), min(flag.step for flag in run.flags), "first flag", "left")
        if run.turned is not None:
            _mark((above,), run.turned, "loss turned", "right")
    below.axhline(100, color="black", linewidth=0.8)
    above.set_yscale("log")
    below.set_yscale("log")
    above.set_title("loss, mean of 25 steps", fontsize=10, loc="left")
    below.set_title("max_logit of each layer, the deeper the darker; the line is 100", fontsize=10, loc="left")
    _save(figure, (above, below), "max_logit")


def draw_sinks(runs: dict[str, Run]) -> None:
    """What sinks hold in every layer."""
    figure, axes = plt.subplots(figsize=(5.2, 2.5), dpi=110, layout="constrained")
    for name, run in runs.items():
        _plot_layers(axes, run, "sink_share", COLOURS[name])
        axes.get_lines()[-1].set_label(name)
    axes.set_title("sink_share of each layer, the deeper the darker", fontsize=10, loc="left")
    _save(figure, (axes,), "sink_share")


def draw_heat_maps(runs: dict[str, Run]) -> None:
    """Of both runs at their ends, as they are logged."""
    for name, run in zip(("healthy", "too-high"), runs.values(), strict=True):
        for metric, scale in HEAT_SCALES.items():
            picture = None if run.last is None else layer_heat_map(run.last, scale)
            if picture is not None:
                Image.fromarray(picture).save(OUT / f"layers-{metric}-{name}.jpg", quality=80)


def _plot_layers(axes: Axes, run: Run, metric: str, colour: str) -> None:
    for layer, points in enumerate(run.layers(metric)):
        axes.plot(*zip(*points, strict=True), color=colour, alpha=0.4 + 0.6 * layer / (LAYERS - 1), linewidth=1.2)


def _save(figure: Figure, all_axes: Sequence[Axes], file: str) -> None:
    all_axes[-1].set_xlabel("step", fontsize=9)
    for axes in all_axes:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(OUT / f"{file}.png")
    plt.close(figure)
    Image.open(OUT / f"{file}.png").convert("RGB").quantize(64).save(OUT / f"{file}.png", optimize=True)


def _mark(axes: Sequence[Axes], step: int, text: str, side: str) -> None:
    """A dotted line at a step, named in the first of the charts on its left or right."""
    for each in axes:
        each.axvline(step, color="black", linestyle=":", linewidth=1)
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "va": "top", "fontsize": 8}
    axes[0].annotate(f" {text}, step {step} ", (step, 1.0), ha="right" if side == "left" else "left", **place)


def main() -> None:
    """Train both, draw them, and say what came when."""
    runs = {name: train(rate) for name, rate in RATES.items()}
    draw_losses_and_logits(runs)
    draw_sinks(runs)
    draw_heat_maps(runs)
    for name, run in runs.items():
        at, lowest = min(run.averages, key=lambda point: point[1])
        last = max(points[-1][1] for points in run.layers("max_logit"))
        print(f"{name}: loss {lowest:.2f} at step {at}, {run.averages[-1][1]:.2f} at the end; turned at {run.turned}")
        print(f"  largest logit at the end {last:.0f}")
        print("".join(f"  {flag}\n" for flag in run.flags) or "  no flag on logits\n", end="")
        print("" if run.last is None else markdown(COLUMNS, sink_rows(run.last, run.curves)))


if __name__ == "__main__":
    main()
