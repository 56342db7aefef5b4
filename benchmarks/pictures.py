"""Drawing and encoding a snapshot's panels, next to the matplotlib figures that notebooks make."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attn_monitor import AttentionSnapshot, LayerAttention
from attn_monitor.draw.canvas import Pixels, jpeg, resize
from attn_monitor.draw.panels import panel
from attn_monitor.draw.strips import filmstrip
from benchmarks.measure import Spread, take_turns

HEADS, GRID, ROLES, STEPS = 12, (14, 14), ("student", "teacher"), 10


@dataclass(frozen=True)
class Pictures:
    """Times as ratios, bytes of one snapshot's encoded pictures."""

    images: int
    speedup: Spread  # matplotlib's time over ours, for the panels
    panels_ms: float
    strips_ms: float
    panel_bytes: int
    strip_bytes: int
    matplotlib_bytes: int


def photographs(count: int, pixels: int = 224) -> list[Pixels]:
    """Real photographs where scikit-image is installed, which come with it; else smooth noise."""
    if importlib.util.find_spec("skimage") is None:
        noise = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
        return [resize(picture, (pixels, pixels), Image.Resampling.BICUBIC) for picture in noise]
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    files = [folder / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")]
    opened = [np.asarray(Image.open(file).convert("RGB").resize((pixels, pixels))) for file in files]
    return [opened[i % len(opened)] for i in range(count)]


def snapshots(images: int) -> list[AttentionSnapshot]:
    """Made-up attention, smooth over the image and sharper with every step."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(len(ROLES), images * HEADS, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(scores, GRID, mode="bicubic").flatten(2)
    smooth = smooth.unflatten(1, (images, HEADS))  # (roles, B, H, N)
    taken = []
    for step in range(STEPS):
        rows = torch.cat([torch.zeros_like(smooth[..., :1]), smooth * step / 3], -1).softmax(-1)
        layers = {
            (role, 11): LayerAttention(11, "blocks.11.attn", rows[i], 1, GRID, False, 0.0)
            for i, role in enumerate(ROLES)
        }
        taken.append(AttentionSnapshot(100 * step, 0, tuple(f"image {i}" for i in range(images)), layers))
    return taken


def figure(snapshot: AttentionSnapshot, image: int, photo: Pixels) -> bytes:
    """The same cells as a panel has, as a matplotlib figure: photograph, mean and heads for each role, as PNG."""
    import matplotlib.figure

    shown = matplotlib.figure.Figure(figsize=(2 * (HEADS + 2), 2 * len(ROLES)), dpi=72)
    axes = shown.subplots(len(ROLES), HEADS + 2)
    for row, role in zip(axes, ROLES, strict=True):
        maps = snapshot.maps(role)[image]
        for axis, cell, title in zip(
            row,
            [photo, *torch.cat([maps.mean(0, keepdim=True), maps])],
            ["original", "mean", *(f"head {h}" for h in range(HEADS))],
            strict=True,
        ):
            axis.imshow(cell, cmap="inferno")
            axis.set_title(f"{role} {title}", fontsize=7)
            axis.axis("off")
    encoded = io.BytesIO()
    shown.savefig(encoded, format="png")
    return encoded.getvalue()


def measure_pictures(images: int, budget: float) -> Pictures:
    """All panels of one snapshot, all film strips of ten, all figures."""
    photos, history = photographs(images), snapshots(images)
    last = history[-1]

    def panels() -> list[bytes]:
        return [jpeg(panel(last, i, photo)) for i, photo in enumerate(photos)]

    def strips() -> list[bytes]:
        return [jpeg(filmstrip(history, i, photo)) for i, photo in enumerate(photos)]

    def figures() -> list[bytes]:
        return [figure(last, i, photo) for i, photo in enumerate(photos)]

    rounds = take_turns({"panels": panels, "strips": strips, "figures": figures}, budget=budget)
    return Pictures(
        images,
        rounds.ratio("figures", "panels"),
        rounds.milliseconds("panels"),
        rounds.milliseconds("strips"),
        *(sum(map(len, encode())) for encode in (panels, strips, figures)),
    )
