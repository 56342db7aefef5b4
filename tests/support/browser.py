"""One real headless Chromium for the tests of the player: what it logs and asks for is kept, its pixels can be read."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None and os.environ.get("REQUIRE_BROWSER"):
    raise RuntimeError("REQUIRE_BROWSER is set and there is no browser: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def pixels_of(canvas: Any) -> np.ndarray[Any, Any]:
    """What is drawn on a canvas, (height, width, 3) integers."""
    encoded = canvas.evaluate("canvas => canvas.toDataURL('image/png')").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(np.int64)


class Watched:
    """A page with all that went wrong in it, and the addresses outside of it that it asked for."""

    def __init__(self, page: Any) -> None:
        self.page, self.wrong, self.asked = page, list[str](), list[str]()
        page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, path: Path, view: str = "", width: int = 1400, height: int = 900, scheme: str = "light") -> Any:
        """A file, in a view, once its first picture is drawn."""
        self.page.goto("about:blank")
        self.wrong.clear()
        self.asked.clear()
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)
        self.page.goto(f"{path.as_uri()}{f'#{view}' if view else ''}")
        self.page.wait_for_selector("body[data-ready]")
        self.settle()
        return self.page

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.page.evaluate(
            """async () => {
                const drawn = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
                for (let i = 0; i < 200 && (!i || document.body.classList.contains('waiting')); i++) await drawn();
            }"""
        )

    def check(self) -> None:
        """No error, no request but for the page itself."""
        assert not self.wrong
        assert [url for url in self.asked if not url.startswith(("data:", "blob:", "file:"))] == []
        assert len([url for url in self.asked if url.startswith("file:")]) <= 1


@contextmanager
def browsing() -> Iterator[Watched]:
    """A browser with one page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield Watched(browser.new_page())
        browser.close()
