"""Models that are built in the first training step are watched from then on, and what comes later is said."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, Watch, load_snapshots
from attn_monitor.errors import NoAttentionError
from tests.support.helpers import Distillation, loader, tiny_vit, trainer


class Lazy(pl.LightningModule):
    """Builds what it trains when it is first called."""

    def __init__(self, build: Any = tiny_vit) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.build = build

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if not hasattr(self, "vit"):
            self.vit = self.build()
            self.optimizer = torch.optim.SGD(self.vit.parameters(), 0.1)
        self.optimizer.zero_grad()
        self.vit(batch).square().mean().backward()
        self.optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return []


class LateTeacher(Distillation):
    """Copies its student in its second step."""

    def __init__(self) -> None:
        super().__init__()
        del self.teacher_backbone

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            self.teacher_backbone = copy.deepcopy(self.student_backbone).requires_grad_(False)
        loss: Tensor = self.student_backbone(batch).square().mean()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        pass


def roles(folder: Path) -> list[tuple[int, tuple[str, ...]]]:
    return [(s.step, s.roles) for s in load_snapshots(next(folder.rglob("attn_monitor")))]


def run(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback) -> dict[str, Tensor]:
    torch.manual_seed(1)
    trainer(folder, *callbacks, max_epochs=1, max_steps=-1).fit(module, loader(24))
    return module.state_dict()


@pytest.mark.slow
def test_a_model_that_the_first_step_builds(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", Lazy())
    watched = run(tmp_path / "watched", Lazy(), AttentionMapCallback(every_n_train_steps=2))
    assert roles(tmp_path / "watched") == [(n, ("backbone",)) for n in (1, 2, 4, 6)]
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


@pytest.mark.slow
def test_a_teacher_that_a_step_makes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, LateTeacher(), AttentionMapCallback(every_n_train_steps=2))
    both = ("student", "teacher")
    assert roles(tmp_path) == [(0, ("student",)), (2, both), (4, both), (6, both)]
    assert [r.getMessage() for r in caplog.records if "watched from" in r.getMessage()] == [
        "AttentionMapCallback: watched from step 2 on: teacher (teacher_backbone)"
    ]


def test_what_is_not_found_twice_is_looked_for_no_more(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())

    watch = AttentionMapCallback(every_n_train_steps=1)
    looked: list[bool] = []
    with pytest.warns(UserWarning, match="attention is not watched in this run") as told:
        trainer(tmp_path, watch, Counts(watch, looked), max_epochs=1, max_steps=-1).fit(Lazy(build), loader(24))
    assert sum("not watched" in str(w.message) for w in told) == 1
    assert looked == [True, False, False, False, False, False]


class Counts(pl.Callback):
    """Whether a callback still watches, after each batch has begun."""

    def __init__(self, watch: AttentionMapCallback, found: list[bool]) -> None:
        self.watch, self.found = watch, found

    def on_train_batch_start(self, *_: Any) -> None:
        self.found.append(self.watch.active)


def test_what_was_asked_for_must_be_there_at_once(tmp_path: Path) -> None:
    with pytest.raises(NoAttentionError):
        run(tmp_path, Lazy(), AttentionMapCallback(layers=0))


def test_a_loop_that_builds_its_model(tmp_path: Path) -> None:
    model, batch = nn.Module(), torch.rand(2, 3, 32, 32)
    watch = Watch(model, folder=tmp_path, every_n_train_steps=2)
    for step in range(4):
        watch.step(step, batch=batch)
        if step == 0:
            model.vit = tiny_vit()
        model.vit(batch)
    watch.close(4)
    assert roles(tmp_path) == [(n, ("backbone",)) for n in (1, 2, 4)]
