"""Every Python block of README and of the documents is run, those of a page one after another, as a reader would."""

from __future__ import annotations

import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import attn_monitor
from attn_monitor.commands.cli import _parse
from tests.support.documents import DOCUMENTS, RECIPES, ROOT, blocks, flat_copy, lay_photographs, run
from tests.support.helpers import Distillation, loader, tiny_vit
from tests.support.runs import write_run

COMMAND = re.compile(r"^ *(attn-monitor [a-z]+ .+?)(?: {2,}#.*)?$|`(attn-monitor [a-z]+ [^`]+)`", re.M)
WITH_PYTHON = [page for page in DOCUMENTS if any(not block.why_not for block in blocks(page))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, and a run that has ended."""
    made = tmp_path_factory.mktemp("documents")
    lay_photographs(made / "kinds", size=32)
    flat_copy(made / "kinds", made / "photos")
    flat_copy(made / "kinds", made / "masks")
    write_run(made / "runs" / "version_0" / "attn_monitor", (0, 10), sharpness=(0, 6))
    return made


@pytest.fixture
def reader(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the pages take for granted: a folder to work in, and a few names."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield {
            **{name: getattr(attn_monitor, name) for name in attn_monitor.__all__},
            "L": pl,
            "Logger": pl.loggers.Logger,
            "Trainer": pl.Trainer,
            "torch": torch,
            "module": Distillation(),
            "loader": loader(count=8),
            "student": tiny_vit(),
            "teacher": tiny_vit(),
            "model": tiny_vit(),
            "network": tiny_vit(),
            "probe": attn_monitor.ProbeBatch(torch.rand(2, 3, 32, 32)),
            "images": torch.rand(2, 3, 32, 32),
            "step": 0,
            "steps": 3,
        }
    assert not [str(w.message) for w in seen if "attn_monitor" in f"{w.message} {w.filename}"]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path, reader: dict[str, Any]) -> None:
    names = dict(reader)
    for block in blocks(page):
        if not block.why_not:
            # Lines of the traceback are those of the page.
            ran = run("\n" * (block.line - 1) + block.code, f"page_{page.stem.replace('-', '_')}", **names)
            names |= {name: value for name, value in vars(ran).items() if not name.startswith("__")}


@pytest.mark.parametrize("page", [*DOCUMENTS, *RECIPES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_are_understood(page: Path) -> None:
    """Each command line of the documents has a command and options that there are, and values of their types."""
    for match in COMMAND.finditer(page.read_text()):
        words = shlex.split(match[1] or match[2])
        if not {"…", "..."} & set("".join(words)):
            _parse(words[1:])  # ends the program with one line if it is wrong


def test_a_block_that_is_not_run_says_why(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n<!-- not run: needs a GPU -->\n\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n")
    assert [(block.line, block.why_not) for block in blocks(page)] == [(6, "needs a GPU"), (10, "")]
