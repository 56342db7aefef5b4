"""Wrong use fails at once, by the constructor, by LightningCLI, or before the first step; forward= and dirpath=."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_monitor import (
    AttentionMapCallback,
    AttentionMonitor,
    DrawingOptions,
    MetricOptions,
    ProbeBatch,
    ProbeOptions,
    load_snapshots,
)
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.errors import HeadError
from tests.integration.test_trainer_features import files
from tests.support import forked, forwards
from tests.support.helpers import Distillation, loader, tiny_vit, trainer

RUN = Path("run") / "version_0"
TENSOR = torch.zeros(4, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"drawing": {"heads": [0]}}, r"drawing: received a dict, expected DrawingOptions\(\.\.\.\)"),
        ({"health": None}, r"health: received a NoneType, expected HealthLimits\(\.\.\.\)"),
        ({"metrics": MetricOptions(gram_step=3)}, "gram_step=3: features is False"),
        ({"features": 1}, "features=1: expected True or False"),
        ({"threshold": "half"}, "threshold='half': expected a share"),
        ({"probe": [TENSOR]}, "probe: received a list, expected a folder.*images of the trainer's own data"),
        ({"probe": ProbeOptions("x", masks="m"), "image_size": 0}, "image_size=0"),
        ({"num_images": 4, "probe": TENSOR}, r"num_images=4: probe is a Tensor.*probe\[:4\]"),
        ({"num_images": 8, "probe": ProbeBatch(TENSOR)}, "num_images=8: probe is a ProbeBatch"),
        ({"image_size": 32, "probe": TENSOR}, "image_size=32: probe is a Tensor"),
        ({"image_size": 224, "probe": ProbeBatch(TENSOR)}, "image_size=224: probe is a ProbeBatch"),
        ({"image_size": 224}, "image_size=224: probe is None"),
        ({"image_size": (0, 4), "probe": "x"}, r"image_size=\(0, 4\)"),
        ({"image_size": (1, 2, 3, 4), "probe": "x"}, r"image_size=\(1, 2, 3, 4\)"),
        ({"num_images": -2}, "num_images=-2"),
        ({"num_images": 2.5}, "num_images=2.5"),
        ({"probe": 7}, "probe: received a int"),
        ({"layers": 1.5}, "layers=1.5: expected an index"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": None}, "layers=None"),
        ({"layers": [0, None]}, r"layers=\[0, None\]"),
        ({"layers": True}, "layers=True"),
        ({"query": (1, 2, 3, 4)}, r"query=\(1, 2, 3, 4\)"),
        ({"query": -1}, "query=-1"),
        ({"on_error": "Raise"}, "on_error='Raise'"),
        ({"every_n_train_steps": -5}, "every_n_train_steps=-5"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_train_steps": 2.0}, r"every_n_train_steps=2\.0"),
        ({"forward": "nowhere.at:all"}, "forward='nowhere.at:all': ModuleNotFoundError"),
        ({"forward": "tests.support.forwards:nothing"}, "forward='tests.support.forwards:nothing': AttributeError"),
        ({"forward": "tests.support.forwards.CALLS"}, "that is a list"),
        ({"forward": "plain"}, "forward='plain': that is no import path"),
        ({"forward": 3}, "forward: received a int"),
        ({"dirpath": True}, "dirpath=True: expected a local folder"),
        ({"dirpath": ""}, "dirpath=''"),
        ({"dirpath": "s3://bucket/x"}, "dirpath='s3://bucket/x'"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),  # the same in every process that collects them
)
def test_the_constructor_refuses(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AttentionMapCallback(**arguments)


@pytest.mark.parametrize(("name", "value"), [("layers", []), ("query", "CLS")])
def test_other_entrances_refuse_too(name: str, value: Any) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name}="):
        AttentionMonitor(ProbeBatch(TENSOR), **wrong)
    with pytest.raises(ValueError, match=f"{name}="):
        AttentionRecorder(tiny_vit(), **wrong)


@pytest.mark.parametrize("probe", [None, torch.randn(2, 3, 32, 32)], ids=["adopted", "given"])
def test_a_head_that_the_model_lacks_is_told_before_the_first_step(tmp_path: Path, probe: Tensor | None) -> None:
    running = trainer(tmp_path, AttentionMapCallback(probe, drawing=DrawingOptions(heads=[0, 7])), max_steps=4)
    with pytest.raises(HeadError, match=r"heads=\[0, 7\]: layer 1 of student has heads 0 to 3, so no 7"):
        running.fit(Distillation(), loader(), loader(8))
    assert running.global_step == 0
    watch = AttentionMapCallback(probe, drawing=DrawingOptions(heads=[0, 3]))
    trainer(tmp_path / "b", watch, max_steps=1).fit(Distillation(), loader())


CLI = """
import sys
from lightning.pytorch.cli import LightningCLI
from tests.support.helpers import Distillation
LightningCLI(Distillation, run=False, args=sys.argv[1:], save_config_callback=None)
print("accepted")
"""


def by_command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = ["--trainer.callbacks+=attn_monitor.AttentionMapCallback"]
    words += [f"--trainer.callbacks.{argument}" for argument in arguments]
    return forked.run([sys.executable, "-W", "ignore", "-c", CLI, *words], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "argument",
    [
        "metrics.verify=alway",
        "drawing.scale=log",
        "on_error=ignore",
        "query=CLS",
        "every_n_epochs=often",
        "drawing.x=1",
    ],
)
def test_lightning_cli_refuses(argument: str) -> None:
    ran = by_command_line(argument)
    assert ran.returncode != 0
    assert argument.split("=")[0].split(".")[-1] in ran.stderr
    assert "accepted" not in ran.stdout


@pytest.mark.slow
def test_lightning_cli_accepts() -> None:
    ran = by_command_line(
        "metrics.verify=first", "drawing.scale=minmax", "probe.images=folder", "probe.masks=masks",
        "on_error=raise", "query=mean", "forward=tests.support.forwards.with_flag",
        "dirpath=false", "layers=[0,1]", "drawing.heads=[0]", "drawing.threshold=0.5", "health.peak=0.5",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "accepted" in ran.stdout


class Told(Distillation):
    """Backbones that want an argument of their own."""

    def __init__(self) -> None:
        super().__init__()
        for backbone in (self.student_backbone, self.teacher_backbone):
            backbone.forward = _wants_to_be_told(backbone.forward)  # type: ignore[assignment]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.student_backbone(batch, told=True).square().mean()


def _wants_to_be_told(forward: Any) -> Any:
    def told_forward(images: Tensor, *, told: bool) -> Tensor:
        result: Tensor = forward(images)
        return result

    return told_forward


@pytest.mark.parametrize(
    "forward",
    [forwards.with_flag, "tests.support.forwards:with_flag", "tests.support.forwards.with_flag"],
    ids=["", "colon", "dots"],
)
def test_forward_calls_the_model(tmp_path: Path, forward: Any) -> None:
    forwards.CALLS.clear()
    watch = AttentionMapCallback(forward=forward, on_error="raise")
    trainer(tmp_path, watch, max_steps=1).fit(Told(), loader())
    assert [s.step for s in load_snapshots(tmp_path / RUN / "attn_monitor")] == [0, 1]
    assert (8, 3, 32, 32) in forwards.CALLS
    assert AttentionMapCallback(forward=forward).options.forward is forwards.with_flag


@pytest.mark.slow
def test_dirpath_is_the_archive(tmp_path: Path) -> None:
    """As `ModelCheckpoint` has it: the files are right in it, and a second run does not write among them."""
    for expected in ("mine", "mine-2"):
        watch = AttentionMapCallback(dirpath=tmp_path / "archives" / "mine")
        trainer(tmp_path, watch, max_steps=1).fit(Distillation(), loader())
        assert [s.step for s in load_snapshots(tmp_path / "archives" / expected)] == [0, 1]
    assert not (tmp_path / RUN / "attn_monitor").exists()


def test_dirpath_false_keeps_no_archive(tmp_path: Path) -> None:
    watch = AttentionMapCallback(dirpath=False)
    trainer(tmp_path, watch, max_steps=1).fit(Distillation(), loader())
    assert {path.name.split(".")[0] for path in files(tmp_path)} == {"events", "hparams"}
    assert watch.monitor is not None
    assert [s.step for s in watch.monitor.history] == [0, 1]


def test_dirpath_false_without_a_logger_writes_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no logger, so attention is written nowhere, with dirpath=False"):
        trainer(tmp_path, AttentionMapCallback(dirpath=False), max_steps=1, logger=False).fit(Distillation(), loader())
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_the_command_line_of_lightnings_other_name(tmp_path: Path) -> None:
    """`pytorch_lightning` has a Callback class of its own, and its YAML takes no other."""
    code = """
import sys, warnings
warnings.simplefilter("ignore")
from pytorch_lightning.cli import LightningCLI
import pytorch_lightning as pl, torch
from tests.support.helpers import loader, tiny_vit

class Supervised(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = tiny_vit()
    def training_step(self, batch, index):
        return self.vit(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def train_dataloader(self):
        return loader()

LightningCLI(Supervised, args=sys.argv[1:], save_config_callback=None)
"""
    config = tmp_path / "config.yaml"
    config.write_text(f"""
trainer:
  max_steps: 2
  accelerator: cpu
  default_root_dir: {tmp_path}
  enable_progress_bar: false
  enable_checkpointing: false
  logger: false
  callbacks:
  - class_path: attn_monitor.AttentionMapCallback
    init_args:
      every_n_train_steps: 1
      dirpath: {tmp_path / "archive"}
""")
    forked.run([sys.executable, "-c", code, "fit", "--config", str(config)], check=True, capture_output=True)
    assert [s.step for s in load_snapshots(tmp_path / "archive")] == [0, 1, 2]
