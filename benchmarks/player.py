"""The player in a real browser: how soon the first picture is there, and how many steps a second are drawn."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attn_monitor import AttentionSnapshot, LayerAttention, ProbeBatch
from attn_monitor.player.report import EMBED_BYTES, report_page
from attn_monitor.record.archive import snapshot_path
from benchmarks.measure import Spread
from benchmarks.pictures import GRID, HEADS, ROLES, photographs

FLAGS = ["--no-sandbox", "--no-first-run", "--disable-background-networking"]
WARM_UP = 20  # steps that are drawn before the clock is read

STEPPING = """async count => {
    const step = key => {
        document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
        return new Promise(drawn => requestAnimationFrame(drawn));
    };
    await step('Home');
    const started = performance.now();
    for (let i = 0; i < count; i++) await step('ArrowRight');
    return 1000 * count / (performance.now() - started);
}"""


@dataclass(frozen=True)
class Player:
    """Of a run of ``steps`` snapshots: bytes of the file and of the embed edition, and times in the browser."""

    images: int
    steps: int
    file_bytes: int
    embed_bytes: int
    first_picture_ms: Spread  # from the start of navigation
    steps_per_second: Spread  # heads of both roles and curves included; browsers draw 60 at most


def measure_player(images: int, steps: int, rounds: int) -> Player | None:
    """None where there is no Chromium, or no Playwright to drive it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder)
        write_run(archive, images, steps)
        page = report_page([("run", archive)])
        embed = report_page([("run", archive)], limit=EMBED_BYTES)
        (archive / "report.html").write_text(page, encoding="utf-8")
        opened = [_open(chromium, archive / "report.html", steps) for _ in range(rounds)]
    first, speed = (Spread.of([values[i] for values in opened]) for i in range(2))
    return Player(images, steps, len(page.encode()), len(embed.encode()), first, speed)


def write_run(folder: Path, images: int, steps: int, layers: int = 1) -> None:
    """An archive of photographs and made-up attention of the last layers, noisy and sharper with every step."""
    photos = torch.from_numpy(np.stack(photographs(images))).permute(0, 3, 1, 2).float() / 255
    ProbeBatch(photos, mean=(0, 0, 0), std=(1, 1, 1)).save(folder / "probe.npz")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(len(ROLES), images * HEADS, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(scores, GRID, mode="bicubic").flatten(2).unflatten(1, (images, HEADS))
    for step in range(steps):
        noisy = smooth * 6 * step / steps + 0.3 * torch.randn(smooth.shape, generator=generator)
        rows = torch.cat([torch.zeros_like(noisy[..., :1]), noisy], -1).softmax(-1)
        captured = {
            (role, layer): LayerAttention(layer, f"blocks.{layer}", rows[i], 1, GRID, False, 0.0)
            for layer in range(12 - layers, 12)
            for i, role in enumerate(ROLES)
        }
        names = tuple(f"image{i}" for i in range(images))
        AttentionSnapshot(100 * step, 0, names, captured).save(snapshot_path(folder, 100 * step))


def _open(chromium: str, path: Path, steps: int) -> tuple[float, float]:
    """Milliseconds to the first picture, and steps a second, in a browser of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page: Any = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        first = page.evaluate("performance.getEntriesByName('first picture')[0].startTime")
        page.wait_for_timeout(1000)  # the rest is unpacked meanwhile
        page.evaluate(STEPPING, min(WARM_UP, steps - 1))
        speed = page.evaluate(STEPPING, steps - 1)
        browser.close()
    return float(first), float(speed)
