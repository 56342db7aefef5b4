"""The Python in the documents: blocks of Markdown, and the folder that they run in."""

from __future__ import annotations

import re
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
NOT_RUN = re.compile(r"<!-- not run: (?P<why>.+?) -->\s*\Z", re.S)  # directly before a block
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass
class Block:
    """A fenced block, with its first line's number in the document; ``why_not`` it runs is empty if it does."""

    language: str
    code: str
    line: int
    why_not: str


def blocks(document: Path, language: str = "python") -> list[Block]:
    """The blocks of one language, in order."""
    text = document.read_text()
    found = []
    for match in FENCE.finditer(text):
        reason = NOT_RUN.search(text[: match.start()])
        line = text[: match.start("code")].count("\n") + 1
        found.append(Block(match["language"], match["code"], line, reason["why"] if reason else ""))
    return [block for block in found if block.language == language]


def prose(document: Path) -> str:
    """The text without its fenced blocks and inline code, in which a link is no link."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", document.read_text()))


def made_small(code: str, **constants: Any) -> str:
    """A recipe with other values of its constants, each of which it must have, at the start of a line."""
    for name, value in constants.items():
        code, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", code, flags=re.M)
        assert count == 1, f"{name} = ... is there {count} times"
    return code


def run(code: str, name: str, **names: Any) -> types.ModuleType:
    """Run code as a module that can be found by its name, as classes, pickle and LightningCLI need it."""
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module
    try:
        exec(compile(code, f"<{name}>", "exec"), vars(module))
    finally:
        del sys.modules[name]
    return module


def lay_photographs(folder: Path, size: int = 128) -> None:
    """Two classes of two small photographs each, as ImageFolder and Lightly take them, and masks of nothing."""
    import skimage.data
    from PIL import Image

    source = Path(skimage.data.__file__).parent
    for kind, names in {"people": ("astronaut.png", "rocket.jpg"), "things": ("chelsea.png", "coffee.png")}.items():
        (folder / kind).mkdir(parents=True)
        for name in names:
            with Image.open(source / name) as image:
                image.convert("RGB").resize((size, size)).save(folder / kind / name)


def flat_copy(folder: Path, into: Path) -> None:
    """The same photographs in one folder."""
    into.mkdir()
    for file in folder.rglob("*.*"):
        shutil.copy(file, into)
