"""Frameworks that hide Lightning's Trainer: a callback by environment variables alone, and nothing without them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attn_monitor import AttentionMapCallback, DrawingOptions, MetricOptions, load_snapshots
from attn_monitor.environment import callback_from
from attn_monitor_auto import callbacks
from tests.support import forked
from tests.support.helpers import Distillation, loader, trainer


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("ATTN_MONITOR"):
            monkeypatch.delenv(name)


def ours(running: Any) -> list[AttentionMapCallback]:
    return [c for c in running.callbacks if isinstance(c, AttentionMapCallback)]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_both_namespaces_of_lightning_find_it(namespace: str) -> None:
    (found,) = entry_points(group=f"{namespace}.callbacks_factory", name="attn_monitor")
    assert found.load() is callbacks


@pytest.mark.parametrize("value", [None, "", "0", "false", "off"])
def test_it_is_off_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("ATTN_MONITOR", value)
    assert ours(trainer(tmp_path)) == []


def test_nothing_is_imported_while_it_is_off() -> None:
    code = "import sys, attn_monitor_auto as auto; auto.callbacks(); print({'torch', 'attn_monitor'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_a_run_without_any_code_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_MONITOR", "1")
    monkeypatch.setenv("ATTN_MONITOR_EVERY_N_TRAIN_STEPS", "4")
    running = trainer(tmp_path)
    running.fit(Distillation(), loader(), loader(8))
    assert [s.step for s in load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor")] == [0, 4, 8]


@pytest.mark.slow
def test_a_run_with_a_callback_of_its_own_is_left_to_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_MONITOR", "1")
    running = trainer(tmp_path, AttentionMapCallback(), max_steps=2)
    running.fit(Distillation(), loader(), loader(8))
    assert len(ours(running)) == 2
    assert [path.name for path in tmp_path.rglob("attn_monitor*")] == ["attn_monitor"]


def test_arguments_from_a_file_and_from_variables(tmp_path: Path) -> None:
    """Of the right types; a variable goes before the file."""
    (tmp_path / "watch.yaml").write_text(
        "num_images: 4\nquery: mean\nhealth:\n  snapshots: 7\ntargets: {a: b.c}\n"
        "features: true\nmetrics: {gram_step: 9}\ndrawing: {threshold: 0.4, heads: [1]}\n"
    )
    made = callback_from(
        {
            "ATTN_MONITOR": "1",
            "ATTN_MONITOR_CONFIG": str(tmp_path / "watch.yaml"),
            "ATTN_MONITOR_NUM_IMAGES": "3",
            "ATTN_MONITOR_DRAWING__THRESHOLD": "0.5",
            "ATTN_MONITOR_DRAWING__SCALE": "minmax",
            "ATTN_MONITOR_LAYERS": "[0, -1]",
            "ATTN_MONITOR_PROBE": str(tmp_path),
        }
    )
    assert (made.options.query, made.options.layers, made.targets) == ("mean", [0, -1], {"a": "b.c"})
    assert (made.options.probe.images, made.options.probe.count) == (str(tmp_path), 3)
    assert made.options.drawing == DrawingOptions(0.5, heads=[1], scale="minmax")
    assert made.options.metrics == MetricOptions(gram_step=9)
    assert made.options.health.snapshots == 7


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("NUM_IMAGES", "many", "num_images"),
        ("NUM_IMAGES", "0", "num_images=0"),
        ("LAYER", "1", "ATTN_MONITOR_LAYER: expected one of .*ATTN_MONITOR_LAYERS"),
        ("CONFIG", "/nowhere.yaml", "nowhere.yaml"),
        ("DRAWING__THRESHOLD", "60", "threshold=60"),
        ("METRICS__GRAM", "60", "gram"),
    ],
)
def test_a_mistake_is_a_warning_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    monkeypatch.setenv("ATTN_MONITOR", "1")
    monkeypatch.setenv(f"ATTN_MONITOR_{name}", value)
    with pytest.warns(UserWarning, match=f"ATTN_MONITOR is set, and attention is not watched in this run.*{text}"):
        running = trainer(tmp_path)
    assert ours(running) == []


PRETRAIN = """
import sys, lightly_train
if __name__ == "__main__":
    lightly_train.pretrain(
        out=sys.argv[1], data=sys.argv[2], model="timm/vit_tiny_patch16_224", method="dino", epochs=1, batch_size=4,
        num_workers=0, accelerator="cpu", model_args={"img_size": 32}, loggers={"tensorboard": {}},
        transform_args={"image_size": (32, 32), "local_view": None},
    )
"""


@pytest.mark.slow
def test_lightly_train(tmp_path: Path) -> None:
    """From its package, as its users call it: it takes no callbacks."""
    (tmp_path / "images").mkdir()
    for index in range(8):
        Image.effect_noise((48, 48), 50 + 20 * index).convert("RGB").save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "pretrain.py").write_text(PRETRAIN)
    command = [sys.executable, "pretrain.py", "out", "images"]
    ran = forked.run(
        command, cwd=tmp_path, env={**os.environ, "ATTN_MONITOR": "1"}, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (archive,) = (tmp_path / "out").rglob("attn_monitor")
    snapshots = load_snapshots(archive)
    assert [s.step for s in snapshots] in ([0, 2], [0, 1, 2])  # one in so few steps may be put off
    assert snapshots[0].roles == ("student", "teacher")
    assert "student (student_embedding_model.wrapped_model._model) and teacher" in ran.stderr + ran.stdout
