"""The real TensorBoard in a real browser: the pictures load, and the per-head charts are there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from attn_monitor import AttentionMapCallback
from tests.helpers import Distillation, loader, trainer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture
def tensorboard(tmp_path: Path, free_port: int) -> Iterator[str]:
    """Address of a TensorBoard that serves a short run, on a free loopback port."""
    trainer(tmp_path, AttentionMapCallback(num_images=2), max_steps=3).fit(Distillation(), loader(), loader(8))
    options = ["--host", "127.0.0.1", "--port", str(free_port), "--samples_per_plugin", "images=1000"]
    with open(tmp_path / "tensorboard.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), *options],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    address = f"http://127.0.0.1:{free_port}"
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"{address}/data/plugin/images/tags", timeout=2) as answer:
                    if b"attn_filmstrip" in answer.read():
                        break
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                pass
            assert server.poll() is None, (tmp_path / "tensorboard.log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)


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
        while time.monotonic() < deadline and len(sizes) < 4:
            page.wait_for_timeout(500)
            sizes = [s for frame in page.frames for s in frame.evaluate(loaded)]
        assert len(sizes) >= 4, sizes  # two images, a panel and a film strip each
        for natural, shown in sizes:
            assert natural > 400
            assert shown > 250
        page.goto(f"{tensorboard}/#custom_scalars")
        for chart in ("entropy per head", "student, layer 1", "teacher, layer 1"):
            page.get_by_text(chart, exact=True).first.wait_for(timeout=60_000)
        browser.close()
