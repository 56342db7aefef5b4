"""Each role is watched by itself: what fails in one costs the others nothing, and says in which it was."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, AttentionMonitor, ProbeBatch, Watch, load_snapshots, record_attention
from attn_monitor.background import failures
from attn_monitor.commands.report import report
from attn_monitor.errors import ForwardError
from tests.support.helpers import Distillation, loader, tiny_vit, trainer
from tests.support.tiers import sweep

ARCHIVE = Path("run", "version_0", "attn_monitor")
PROBE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class SmallTeacher(Distillation):
    """The teacher takes crops of 16 × 16 pixels, and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher_backbone = tiny_vit(img_size=16, dynamic_img_size=False).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.student_backbone(batch) - self.teacher_backbone(batch[..., :16, :16])).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        pass


class Damaged(Distillation):
    """The teacher loses its last normalisation in one step, and has it again in another."""

    def __init__(self, at: tuple[int | None, int | None] = (1, 5)) -> None:
        super().__init__()
        self.at = at

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if self.global_step == self.at[0]:
            self.lost, self.teacher_backbone.blocks[1].norm1 = [self.teacher_backbone.blocks[1].norm1], None
        elif self.global_step == self.at[1]:
            self.teacher_backbone.blocks[1].norm1 = self.lost.pop()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.student_backbone(batch).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        pass


def fit(folder: Path, module: Any, **arguments: Any) -> tuple[AttentionMapCallback, list[str]]:
    watch = AttentionMapCallback(**{"every_n_train_steps": 1, **arguments})
    running = trainer(folder, watch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running.fit(module, loader(32), loader(8))
    assert running.global_step == 8
    return watch, [str(w.message) for w in caught if "AttentionMapCallback" in str(w.message)]


def steps_by_role(folder: Path) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for snapshot in load_snapshots(folder):
        for role in snapshot.roles:
            steps.setdefault(role, []).append(snapshot.step)
    return steps


@pytest.mark.parametrize("probe", sweep([PROBE, None], quick=1), ids=["given", "adopted"])
def test_a_teacher_of_another_image_size_costs_the_student_nothing(tmp_path: Path, probe: Tensor | None) -> None:
    module = SmallTeacher()
    watch, told = fit(tmp_path, module, probe=probe)
    assert steps_by_role(tmp_path / ARCHIVE) == {"student": list(range(9))}
    assert "taking a snapshot of teacher failed, training goes on. ForwardError: VisionTransformer failed" in told[0]
    assert "taking a snapshot of teacher: steps 0, 1, 2, 3, 4, 5, 6, 7, 8" in told[1]
    assert len(told) == 2
    assert watch.monitor is not None
    assert watch.monitor.previous is not None
    (expected,) = record_attention(module.student_backbone, watch.monitor.probe.images)
    torch.testing.assert_close(watch.monitor.previous.layers["student", 1].rows, expected.rows)


@pytest.mark.slow
def test_a_damaged_teacher_costs_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "LONGEST_PAUSE", 0.0)  # it is retried at each step
    watch, told = fit(tmp_path, Damaged())
    steps = steps_by_role(tmp_path / ARCHIVE)
    assert steps["student"] == list(range(9))
    assert steps["teacher"][:2] == [0, 1]
    assert steps["teacher"][-1] == 8
    assert not {2, 3, 4} & set(steps["teacher"])
    assert "taking a snapshot of teacher failed, training goes on. ForwardError: VisionTransformer failed" in told[0]
    assert "taking a snapshot of teacher works again; missing: steps 2, 3, 4" in told[1]
    assert len(told) == 2
    assert not any(flag.role == "student" for flag in watch.monitor.health.flags)  # type: ignore[union-attr]
    report(str(tmp_path / ARCHIVE), out=str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_teacher_of_nan_from_the_start(tmp_path: Path) -> None:
    module = Damaged(at=(None, None))
    for parameter in module.teacher_backbone.parameters():
        parameter.fill_(torch.nan)
    _, told = fit(tmp_path, module)
    assert steps_by_role(tmp_path / ARCHIVE) == {"student": list(range(9))}
    assert "taking a snapshot of teacher failed, training goes on. NonFiniteAttentionError" in told[0]


def test_a_role_that_the_user_named_ends_the_run_before_the_first_step(tmp_path: Path) -> None:
    targets = {"student": "student_backbone", "teacher": "teacher_backbone"}
    with pytest.raises(ForwardError, match="teacher: VisionTransformer failed on images"):
        fit(tmp_path, SmallTeacher(), targets=targets, probe=PROBE)
    with pytest.raises(ForwardError, match="VisionTransformer failed on images"):
        fit(tmp_path / "raise", SmallTeacher(), on_error="raise")


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    module = SmallTeacher()
    watch = Watch(module, PROBE, folder=tmp_path, every_n_train_steps=1)
    with pytest.warns(UserWarning, match="taking a snapshot of teacher failed"):
        watch.step(0)
    watch.step(1)
    with pytest.warns(UserWarning, match="taking a snapshot of teacher: steps 0, 1, 2"):
        watch.close(2)
    assert steps_by_role(tmp_path / "attn_monitor") == {"student": [0, 1, 2]}


def test_all_roles_that_fail_are_one_failure(tmp_path: Path) -> None:
    module = SmallTeacher()
    module.student_backbone = tiny_vit(img_size=48, dynamic_img_size=False)
    watch = Watch(module, PROBE, folder=tmp_path)
    with pytest.warns(UserWarning, match=r"not watched in this run\. student: VisionTransformer failed on images"):
        watch.step(0)
    assert not watch.active
    watch.close()


def test_a_monitor_of_ones_own_raises_and_names_the_role() -> None:
    models: dict[str, nn.Module] = {"student": tiny_vit(), "teacher": tiny_vit(img_size=16, dynamic_img_size=False)}
    monitor = AttentionMonitor(ProbeBatch(PROBE))
    with pytest.raises(ForwardError, match=r"^teacher: VisionTransformer failed on images"):
        monitor.check(models)
    with pytest.raises(ForwardError, match=r"^teacher: VisionTransformer failed on images"):
        monitor.snapshot(models, step=0)
    alone = AttentionMonitor(ProbeBatch(PROBE), alone=True)
    assert alone.snapshot(models, step=0).roles == ("student",)
    assert list(alone.failed) == ["teacher"]
