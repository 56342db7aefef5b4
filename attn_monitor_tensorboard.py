"""TensorBoard's tab "Attention": show archives below --logdir in the player, live while training goes on.

TensorBoard imports this module whenever it starts, so it imports the package only when the tab is opened.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.plugins import base_plugin
from werkzeug import wrappers

if TYPE_CHECKING:
    from attn_monitor.player.server import Library

SNAPSHOT = re.compile(r"step-[0-9]{9,18}\.npz")
NUMBER = re.compile(r"-?[0-9]{1,18}")
FRESH = 3.0  # seconds between two scans of the log directory, at least
SHARE = 0.1  # of the time is spent scanning, at most, if the directory is large or remote

HOST = """const page = new URL("page", import.meta.url);
export function render() {
  const frame = document.createElement("iframe");
  Object.assign(frame, {src: page, title: "Attention", allow: "clipboard-write"});
  Object.assign(frame.style, {border: 0, width: "100vw", height: "100vh", display: "block"});
  document.body.style.margin = 0;
  document.body.replaceChildren(frame);
}
"""


class AttentionPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # it has no types
    """Serve the player and the data of `attn_monitor.player.server`."""

    plugin_name = "attention"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._archives = Archives(context.logdir or None)

    def is_active(self) -> bool:
        """Whether there is an archive to show."""
        return bool(self._archives.found())

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Describe the tab; the player updates itself, so TensorBoard does not reload it."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Attention", disable_reload=True)

    def get_plugin_apps(self) -> Mapping[str, Callable[..., Any]]:
        """Return the routes of the tab's module, the page, and the data that the page requests."""
        return {
            "/index.js": _answering(lambda query: (HOST, "text/javascript")),
            "/page": _answering(_page),
            "/runs": _answering(lambda query: (self._library.runs(), "application/json")),
            "/run": _answering(self._run),
            "/block": _answering(self._block),
        }

    @functools.cached_property
    def _library(self) -> Library:
        from attn_monitor.player.server import Library

        return Library(self._archives.found)

    def _run(self, query: Mapping[str, str]) -> tuple[Any, str]:
        after, generation = _number(query, "after", "-1"), query.get("generation", "")
        return self._library.run(query.get("run", ""), after, generation), "application/json"

    def _block(self, query: Mapping[str, str]) -> tuple[Any, str]:
        found = self._library.block(query.get("run", ""), _number(query, "step"), _number(query, "layer"))
        return found, "application/octet-stream"


class Archives:
    """Find archive folders below a log directory, by relative path; symbolic links are not followed."""

    def __init__(self, root: str | None) -> None:
        self._root = root
        self._found: dict[str, Path] = {}
        self._lock, self._until = threading.Lock(), 0.0

    def found(self) -> dict[str, Path]:
        """Return all archives, from a scan a moment ago."""
        with self._lock:
            if self._root is not None and (began := time.monotonic()) >= self._until:
                self._found, now = self._look(Path(self._root)), time.monotonic()
                self._until = now + max(FRESH, (now - began) / SHARE)
            return self._found

    @staticmethod
    def _look(root: Path) -> dict[str, Path]:
        found = {}
        for folder, below, files in os.walk(root):
            below[:] = sorted(name for name in below if not name.startswith((".", "superseded-")))
            snapshots = filter(SNAPSHOT.fullmatch, files)
            if any(not os.path.islink(os.path.join(folder, name)) for name in snapshots):
                name = os.path.relpath(folder, root)
                short = name.removesuffix(f"{os.sep}attn_monitor")
                found[name if short in found else short] = Path(folder)
        return found


def _answering(answer: Callable[[Mapping[str, str]], tuple[Any, str]]) -> Callable[..., Any]:
    """Make a WSGI application; its responses never repeat parts of the request, in body or headers."""

    @wrappers.Request.application
    def app(request: wrappers.Request) -> wrappers.Response:
        if request.method not in ("GET", "HEAD"):
            return _respond("only GET is answered", "text/plain", 405)
        from attn_monitor.errors import ArchiveError

        try:
            content, kind = answer(request.args)
        except (KeyError, OSError):
            return _respond("not found", "text/plain", 404)
        except ValueError as error:
            known = isinstance(error, ArchiveError)
            return _respond(
                "this run cannot be shown" if known else "not a number", "text/plain", 404 if known else 400
            )
        return _respond(content, kind)

    return app


def _page(query: Mapping[str, str]) -> tuple[Any, str]:
    from attn_monitor.player.page import page_of_server

    return page_of_server(), "text/html"


def _respond(content: Any, kind: str, status: int = 200) -> wrappers.Response:
    body = json.dumps(content, allow_nan=False) if isinstance(content, dict) else content
    policy = "default-src 'none'"
    if kind == "text/html":
        from attn_monitor.player.page import policy_of

        policy = policy_of(server=True)  # frames anywhere, as notebooks show TensorBoard in one of another origin
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    charset = "" if isinstance(body, bytes) else "; charset=utf-8"
    return wrappers.Response(body, status, headers, content_type=f"{kind}{charset}")


def _number(query: Mapping[str, str], name: str, default: str = "") -> int:
    text = query.get(name, default)
    if not NUMBER.fullmatch(text):
        raise ValueError(name)
    return int(text)
