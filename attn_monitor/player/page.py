"""One HTML page of the player's modules and style, with its data inside or with the address of a server.

The modules are plain JavaScript and import each other by name. A page has them all in one script, whose hash its
content-security policy names: no other script runs in it, whatever names of images and runs hold.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn_monitor.player.contents import Contents, colour_tables

WEB = Path(__file__).parent / "web"
MODULES = (
    "places",
    "numbers",
    "colours",
    "source",
    "view",
    "painting",
    "tiles",
    "stage",
    "charts",
    "timeline",
    "inspector",
    "controls",
    "picture",
    "main",
)  # fmt: skip - each imports those before it alone

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


def page_of_runs(runs: Sequence[Contents]) -> str:
    """A file that needs nothing else: data and all are inside, and its policy forbids every request."""
    encoded: list[str] = []
    offset = 0
    manifests = []
    for run in runs:
        manifest = run.manifest()
        for step, facts in zip(run.steps, manifest["steps"], strict=True):
            facts["blocks"] = {}
            for layer, packed in step.blocks.items():
                text = base64.b64encode(packed).decode()
                facts["blocks"][layer] = [offset, len(text)]
                encoded.append(text)
                offset += len(text)
        manifests.append(manifest)
    return _page({"runs": manifests, "tables": colour_tables()}, "".join(encoded))


def page_of_server() -> str:
    """The page that asks the server that it came from, and nobody else, for runs."""
    return _page({"server": True, "tables": colour_tables()}, "")


def policy_of(*, server: bool) -> str:
    """The content-security policy: this script and this style alone, pictures of the page itself."""
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
    """Bytes of the page without data."""
    return sum(len(source.encode()) for source in _sources())


def _page(manifest: dict[str, Any], blocks: str) -> str:
    script, style, body = _sources()
    # In a script element only "<" could end it, or begin a comment.
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    text = text.encode(errors="replace").decode()  # names of files may hold bytes that are no text
    policy = policy_of(server=bool(manifest.get("server")))
    return _PAGE.format(policy=policy, style=style, body=body, manifest=text, blocks=blocks, script=script)


@functools.cache
def _sources() -> tuple[str, str, str]:
    """Script, style and body."""
    script = "\n".join(_inlined((WEB / f"{name}.js").read_text(encoding="utf-8")) for name in MODULES)
    style = (WEB / "player.css").read_text(encoding="utf-8")
    return script, style, (WEB / "body.html").read_text(encoding="utf-8").strip()


def _inlined(module: str) -> str:
    """A module without its imports, which stand before it, and without the word export."""
    without = re.sub(r"^import [^;]*;\n", "", module, flags=re.MULTILINE)
    return re.sub(r"^export ", "", without, flags=re.MULTILINE)


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
