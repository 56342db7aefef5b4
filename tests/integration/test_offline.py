"""`attn_monitor.offline`: the functions that the documents promise, importable from there at no cost."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attn_monitor import offline

ROOT = Path(__file__).parent.parent.parent


def promised() -> set[str]:
    """Names that the page of the commands lists after `attn_monitor.offline`."""
    text = (ROOT / "docs" / "offline.md").read_text()
    (sentence,) = re.findall(r"`attn_monitor\.offline`(.+?)\n\n", text, re.DOTALL)
    return set(re.findall(r"`(\w+)`", sentence))


def test_what_the_documents_promise_is_there() -> None:
    assert {"load_model", "attention_video", "backfill_run", "compare_runs", "summarise_run"} <= promised()
    assert promised() <= set(dir(offline))


@pytest.mark.parametrize("name", offline.__all__)
def test_every_name_is_a_function_with_its_documentation(name: str) -> None:
    function = getattr(offline, name)
    assert function.__name__ == name
    assert function.__doc__
    assert getattr(importlib.import_module(function.__module__), name) is function


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(offline.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert all(getattr(importlib.import_module(str(seen[name])), name) is getattr(offline, name) for name in seen)
    assert sorted(seen) == offline.__all__ == dir(offline)


def test_the_module_itself_costs_nothing() -> None:
    code = "import sys, attn_monitor.offline\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'attn_monitor\.offline' has no attribute 'load_modell'"):
        _ = offline.load_modell
    with pytest.raises(ImportError, match="load_modell"):
        exec("from attn_monitor.offline import load_modell")
