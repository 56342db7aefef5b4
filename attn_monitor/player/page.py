"""The HTML page: the modules of `web` as one script, its style, and data, inside the file or from a server.

The page's content-security policy names the hashes of script and style: no other script runs in it, whatever the names
of images and runs contain.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_monitor.player.bundle import bundle
from attn_monitor.player.constants import drawing_constants
from attn_monitor.player.contents import Contents

WEB = Path(__file__).parent / "web"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Attention</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="manifest">{manifest}</script>
<script type="text/plain" id="blocks">{blocks}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def page_of_runs(runs: Sequence[Contents], *, listed: Mapping[str, Any] | None = None) -> str:
    """A file that contains all its data; its policy forbids every request.

    Args:
        runs: one, two to compare, or many.
        listed: opens the page as a list of its runs; the metrics and the snapshot that it shows first, see `Manifest`
            in web/types.d.ts.
    """
    encoded: list[str] = []
    offset = 0
    manifests = []
    for run in runs:
        manifest = run.manifest()
        same = next((i for i, other in enumerate(runs) if other.images["images"] == run.images["images"]), None)
        if same is not None and runs[same] is not run:
            manifest["images"] = same  # which that run holds
        for step, facts in zip(run.steps, manifest["steps"], strict=True):
            facts["blocks"] = {}
            for layer, packed in step.blocks.items():
                text = base64.b64encode(packed).decode()
                facts["blocks"][layer] = [offset, len(text)]
                encoded.append(text)
                offset += len(text)
        manifests.append(manifest)
    return _page({"runs": manifests, **({} if listed is None else {"list": listed})}, "".join(encoded))


def page_of_server() -> str:
    """A page without data, which requests runs from the server that it came from and from no other."""
    return _page({"server": True, "runs": []}, "")


def policy_of(*, server: bool) -> str:
    """The content-security policy: this script and this style only, and images that the page itself contains."""
    script, style, _ = _sources()
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "img-src data: blob:",
            f"connect-src {chr(39)}{'self' if server else 'none'}{chr(39)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def code_size() -> int:
    """Size of the page without data, in bytes."""
    return sum(len(source.encode()) for source in _sources())


def _page(manifest: dict[str, Any], blocks: str) -> str:
    script, style, body = _sources()
    manifest = {**manifest, "drawing": drawing_constants()}
    # Within a script element only "<" could end it, or begin a comment.
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    text = text.encode(errors="replace").decode()  # names of files may contain bytes that are not UTF-8
    policy = policy_of(server=bool(manifest.get("server")))
    return _PAGE.format(policy=policy, style=style, body=body, manifest=text, blocks=blocks, script=script)


@functools.cache
def _sources() -> tuple[str, str, str]:
    """Script, style and body."""
    style, body = ((WEB / name).read_text(encoding="utf-8") for name in ("player.css", "body.html"))
    return bundle(WEB / "main.js"), style, body.strip()


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
