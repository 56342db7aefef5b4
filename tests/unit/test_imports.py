"""The direction in which the package's folders import each other, and what importing it does not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import attn_monitor

PACKAGE = Path(attn_monitor.__file__).parent
VALUES = {
    "errors",
    "extras",
    "functional",
    "attention",
    "workers",
    "grid",
    "image_axes",
    "measurements",
    "messages",
    "snapshot",
    "__version__",
}  # modules at the top that any folder may import
MAY_IMPORT = {
    "capture": set(),
    "measure": set(),
    "record": {"measure"},
    "probe": {"record"},
    "background": set(),
    "draw": {"record", "measure"},
    "player": {"draw", "probe", "record", "measure"},
    "trackers": {"background", "draw", "probe", "record", "measure"},
    "train": {
        *("background", "trackers", "player", "draw", "probe", "record", "measure", "capture"),
        *("distributed", "metric_options", "monitor", "attention_snapshot"),
    },
    "weights": {"capture"},
    "commands": {
        *("weights", "train", "player", "background", "trackers", "draw", "probe", "record", "measure", "capture"),
        *("distributed", "metric_options", "monitor"),
    },
}


def imports_of(path: Path) -> Iterator[str]:
    """Names right below the package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules = [f"{node.module}.{a.name}" for a in node.names]
        yield from (m.split(".")[1] for m in modules if m.startswith("attn_monitor."))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_in_one_direction(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | VALUES | {folder}
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in (PACKAGE / folder).rglob("*.py")
        for name in imports_of(path)
        if name not in allowed
    }
    assert not wrong


def test_capture_has_three_floors() -> None:
    """Observation at the bottom, token places on it, and the recording of layers on both."""
    inside = PACKAGE / "capture"
    for floor, below in (("observe", ("observe",)), ("token_places", ("observe", "token_places"))):
        for path in (inside / floor).rglob("*.py"):
            modules = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
            names = {m.split(".")[2] for m in modules if m.startswith("attn_monitor.capture.")}
            assert names <= set(below), path


def test_every_folder_is_in_the_picture() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == MAY_IMPORT.keys()


def test_nothing_imports_the_facade() -> None:
    """`attn_monitor.offline` is for users; it leads to the commands and to nothing else."""
    assert set(imports_of(PACKAGE / "offline.py")) == {"commands", "weights"}
    assert not [path for path in PACKAGE.rglob("*.py") if "offline" in set(imports_of(path))]


def loaded_by(code: str) -> set[str]:
    """Packages that a fresh interpreter has loaded after some code."""
    code = f"import sys\n{code}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


@pytest.mark.slow
def test_capture_needs_no_lightning_and_no_optional_package() -> None:
    code = """
import attn_monitor.commands.cli
from attn_monitor import record_attention, AttentionMonitor, Watch
from attn_monitor.trackers.publisher import Publisher
"""
    heavy = {"lightning", "pytorch_lightning", "torchvision", "tensorboard", "wandb", "matplotlib", "timm"}
    assert not loaded_by(code) & (heavy | {"transformers", "mlflow", "scipy", "av"})


@pytest.mark.slow
def test_the_callback_needs_no_optional_package() -> None:
    before = loaded_by("import lightning.pytorch")
    after = loaded_by("import lightning.pytorch\nfrom attn_monitor import AttentionMapCallback")
    assert not (after - before) & {"wandb", "matplotlib", "timm", "transformers", "mlflow", "scipy", "av"}


def test_public_names_are_listed_and_documented() -> None:
    assert set(attn_monitor.__all__) <= set(dir(attn_monitor))
    for name in attn_monitor.__all__:
        public = getattr(attn_monitor, name)
        assert public.__doc__, name
        assert not callable(public) or ">>> " in public.__doc__, f"{name} has no example"
    assert loaded_by("import attn_monitor; dir(attn_monitor)").isdisjoint({"torch", "lightning", "numpy"})
