"""The real TensorBoard in a real browser: the pictures load, and the per-head charts are there."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attn_monitor import AttentionMapCallback
from tests.support.browser import CHROMIUM
from tests.support.helpers import Distillation, loader, trainer
from tests.support.servers import serving

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture
def tensorboard(tmp_path: Path, free_port: int) -> Iterator[str]:
    """Address of a TensorBoard that serves a short run, on a free loopback port."""
    callback = AttentionMapCallback(num_images=2, heads="curves")
    trainer(tmp_path, callback, max_steps=3).fit(Distillation(), loader(), loader(8))
    options = ["--host", "127.0.0.1", "--port", str(free_port), "--samples_per_plugin", "images=1000"]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), *options]
    address = f"http://127.0.0.1:{free_port}"
    tags = f"{address}/data/plugin/images/tags"
    with serving(command, tags, tmp_path, text=b"attn_filmstrip", env={**os.environ, "PYTHONWARNINGS": "ignore"}):
        yield address


def test_pictures_and_charts_show_in_a_browser(tensorboard: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1200})
        page.goto(f"{tensorboard}/#images")
        loaded = """() => {
            const found = [], walk = root => {
                for (const element of root.querySelectorAll('*')) {
                    if (element.tagName === 'IMG') found.push(element);
                    if (element.shadowRoot) walk(element.shadowRoot);
                }
            };
            walk(document);
            const pictures = found.filter(i => i.src.includes('/images/') && i.complete && i.naturalWidth);
            return pictures.map(i => [i.naturalWidth, i.clientWidth]);
        }"""
        sizes: list[list[int]] = []
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(sizes) < 3:
            page.wait_for_timeout(500)
            sizes = [s for frame in page.frames for s in frame.evaluate(loaded)]
        assert len(sizes) >= 3, sizes  # panels of two images, and the chart of logits; groups below are closed
        for natural, shown in sizes:
            assert natural > 400
            assert shown > 250
        page.goto(f"{tensorboard}/#custom_scalars")
        for chart in ("entropy per head", "student, layer 1", "teacher, layer 1"):
            page.get_by_text(chart, exact=True).first.wait_for(timeout=60_000)
        browser.close()
