"""Where the user has made exceptions of warnings, ours are printed, and training goes on to the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, AttentionMonitor, ProbeBatch, Watch
from attn_monitor.messages import inform
from attn_monitor.trackers.publisher import Publisher
from attn_monitor_auto import callbacks
from tests.support.helpers import Distillation, loader, tiny_vit, trainer


@pytest.fixture(autouse=True)
def _printed(monkeypatch: pytest.MonkeyPatch, _our_warnings_fail_too: None) -> None:
    """As it is outside of tests."""
    monkeypatch.undo()
    assert warnings.filters[0][0] != "always"


class Fails(Distillation):
    """Its teacher cannot be run between two steps, once training has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.stepping = False
        self.teacher_backbone.register_forward_pre_hook(self.check)

    def check(self, *_: Any) -> None:
        if not self.stepping and self.global_step > 1:
            raise RuntimeError("not now")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.stepping = True
        loss = super().training_step(batch, batch_idx)
        self.stepping = False
        return loss


class Convolutions(Distillation):
    """Holds no attention: that is told before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.student_backbone = nn.Sequential(nn.Conv2d(3, 32, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.teacher_backbone = nn.Sequential(nn.Conv2d(3, 32, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def ends(folder: Path, kind: type[Distillation], *watching: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    module = kind()
    running = trainer(folder, *watching, max_steps=4)
    running.fit(module, loader())
    assert running.global_step == 4
    return module.state_dict()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Fails, "taking a snapshot of teacher failed, training goes on"),
        (Convolutions, "attention is not watched in this run"),
    ],
    ids=["in a step", "before the first"],
)
def test_a_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: type[Distillation], said: str) -> None:
    alone = ends(tmp_path / "alone", kind)
    assert said not in capfd.readouterr().err
    watched = ends(tmp_path / "watched", kind, AttentionMapCallback(every_n_train_steps=1))
    assert f"UserWarning: AttentionMapCallback: {said}" in capfd.readouterr().err
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


def test_a_loop_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8))
    watch = Watch(model, torch.rand(2, 3, 32, 32), folder=tmp_path)
    for step in range(3):
        watch.step(step)
    watch.close(3)
    assert "UserWarning: attn_monitor: attention is not watched in this run" in capfd.readouterr().err


def test_a_publisher_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Breaks:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            raise OSError("no route to host")

    probe, model = ProbeBatch(torch.rand(2, 3, 32, 32)), tiny_vit()
    publisher = Publisher([Breaks()], probe)
    publisher.publish(AttentionMonitor(probe).snapshot({"backbone": model}, step=0))
    publisher.close()
    assert "UserWarning: attn_monitor: logging metrics to Breaks failed" in capfd.readouterr().err


def test_a_mistake_in_the_environment_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATTN_MONITOR", "1")
    monkeypatch.setenv("ATTN_MONITOR_EVERY_N_TRAIN_STEPS", "often")
    assert not callbacks()
    assert "UserWarning: attn_monitor: ATTN_MONITOR is set, and" in capfd.readouterr().err


def test_what_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    inform("as it is")
    assert capfd.readouterr().err == "as it is\n"
