"""Health flags, each raised by a model that is driven into that state, and told in every way that is promised."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, AttentionMonitor, HealthFlag, HealthLimits, ProbeBatch, load_snapshots
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, tiny_vit, trainer
from tests.support.wandb_runs import records

HEAD_DIM = 8
DEFAULT = HealthLimits()
ONLY_DEAD_HEADS = HealthLimits(low_entropy=0.0, peak=1.0, divergence_growth=1e9)


def sharp_vit() -> nn.Module:
    """A ViT whose last layer attends to something: the entropy of its heads is well below 1."""
    torch.manual_seed(0)
    model = tiny_vit(qkv_bias=False)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(8)
    return model


def queries_of(model: nn.Module, head: int) -> Tensor:
    """The rows of the last layer's qkv weight that make this head's queries."""
    weight: Tensor = model.blocks[1].attn.qkv.weight
    return weight[head * HEAD_DIM : (head + 1) * HEAD_DIM]


@torch.no_grad()
def collapse(model: nn.Module, head: int = 2) -> None:
    """The softmax's temperature goes to nothing: one patch takes it all."""
    queries_of(model, head).mul_(100)


@torch.no_grad()
def kill(model: nn.Module, head: int = 1) -> None:
    """Queries of zero: every token is attended to alike."""
    queries_of(model, head).zero_()


@torch.no_grad()
def spoil(model: nn.Module) -> None:
    queries_of(model, 3)[0, 0] = float("nan")


def artefact(model: nn.Module, head: int = 0, patch: int = 6) -> None:
    """One patch token grows a hundredfold, in the direction that this head's CLS query looks for."""
    weight = model.blocks[1].attn.qkv.weight.detach()
    keys = weight[32 + head * HEAD_DIM : 32 + (head + 1) * HEAD_DIM]
    seen: list[Tensor] = []
    with torch.no_grad(), model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0][:1, 0])):
        model(torch.randn(1, 3, 32, 32))

    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        query = model.blocks[1].norm1(seen[0]) @ queries_of(model, head).T  # (1, 8)
        x[:, 1 + patch] = 100 * nn.functional.normalize(query @ keys, dim=-1)
        return (x,)

    model.blocks[1].register_forward_pre_hook(hook)


def snapshots(
    change: Callable[[nn.Module], None], after: int = 4, limits: HealthLimits = DEFAULT
) -> tuple[AttentionMonitor, list[tuple[HealthFlag, ...]]]:
    """Flags of one snapshot before the change and some after it."""
    model = sharp_vit()
    monitor = AttentionMonitor(ProbeBatch(torch.randn(4, 3, 32, 32)), health=limits)
    flags = [monitor.snapshot({"teacher": model}, step=0).flags]
    change(model)
    flags += [monitor.snapshot({"teacher": model}, step=10 * n).flags for n in range(1, after + 1)]
    return monitor, flags


def only(flags: list[tuple[HealthFlag, ...]], kind: str) -> HealthFlag:
    """The one flag of this kind."""
    (flag,) = [f for at_a_step in flags for f in at_a_step if f.kind == kind]
    return flag


def test_healthy_models_raise_nothing() -> None:
    _, flags = snapshots(lambda model: None)
    assert flags == [()] * 5


def test_collapsed_head() -> None:
    """After three snapshots in a row, for that head alone, and once."""
    monitor, flags = snapshots(collapse, limits=HealthLimits(low_entropy=0.3, peak=1.0, logit=math.inf))
    flag = only(flags, "low_entropy")
    assert (flag.role, flag.layer, flag.heads, flag.step) == ("teacher", 1, (2,), 30)
    assert flag.value is not None
    assert flag.value < 0.3
    assert str(flag).startswith("teacher, layer 1, head 2: entropy 0.")
    assert str(flag).endswith("below 0.3 for 3 snapshots: nearly all attention on one patch (step 30)")
    assert monitor.health.flags == [flag]
    entropy = monitor.previous.metrics["attn_heads/teacher/layer1/entropy/head2"]
    assert flag.value == pytest.approx(entropy)


def test_dead_uniform_head() -> None:
    _, flags = snapshots(kill)
    flag = only(flags, "high_entropy")
    assert (flag.heads, flag.step) == ((1,), 30)
    assert flag.value == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("apart", "told"), [(1, None), (2, 6)])
def test_a_head_is_not_called_dead_in_a_run_of_four_steps(apart: int, told: int | None) -> None:
    monitor = AttentionMonitor(ProbeBatch(torch.randn(4, 3, 32, 32)), health=ONLY_DEAD_HEADS)
    model = sharp_vit()
    monitor.snapshot({"teacher": model}, step=0)
    kill(model)
    flags = [f for n in range(1, 5) for f in monitor.snapshot({"teacher": model}, step=n * apart).flags]
    assert [flag.step for flag in flags] == ([] if told is None else [told])


def test_uniform_from_the_start_is_no_finding() -> None:
    """Every run starts near uniform attention: only a head that comes back to it is told of."""
    monitor = AttentionMonitor(ProbeBatch(torch.randn(2, 3, 32, 32)))
    model = tiny_vit()
    flags = [monitor.snapshot({"teacher": model}, step=step).flags for step in range(5)]
    assert monitor.previous.metrics["attn/teacher/layer1/entropy"] > 0.995
    assert flags == [()] * 5


def test_artefact_token() -> None:
    monitor, flags = snapshots(artefact)
    flag = only(flags, "peak")
    assert flag.step == 10
    assert 0 in flag.heads
    assert flag.value is not None
    assert flag.value > 0.25
    assert monitor.previous.metrics["attn/teacher/layer1/outlier_fraction"] >= 1 / 16


@pytest.mark.parametrize("side", [8, 16, 24])
def test_uniform_attention_on_few_patches_is_no_finding(side: int) -> None:
    """The last stage of a Swin on small images has four patches, or one: a quarter, or everything, is uniform there."""
    monitor = AttentionMonitor(ProbeBatch(torch.randn(4, 3, side, side)))
    model = tiny_vit()
    flags = [f for step in range(0, 40, 10) for f in monitor.snapshot({"backbone": model}, step=step).flags]
    assert flags == []


def test_a_patch_that_takes_most_of_few_is_a_finding() -> None:
    monitor = AttentionMonitor(ProbeBatch(torch.randn(4, 3, 24, 24)))
    model = sharp_vit()
    collapse(model)
    (flag,) = [f for f in monitor.snapshot({"backbone": model}, step=0).flags if f.kind == "peak"]
    assert 2 in flag.heads
    assert "more than 44%" in flag.text


def test_not_a_number() -> None:
    monitor, flags = snapshots(spoil)
    flag = only(flags, "nan")
    assert (flag.heads, flag.step, flag.value) == ((3,), 10, None)
    assert len(monitor.health.flags) == 1


def test_divergence_that_leaps() -> None:
    """The start from equal weights is no leap; a student that runs away from its teacher is."""
    torch.manual_seed(0)
    teacher, student = sharp_vit(), sharp_vit()
    monitor = AttentionMonitor(ProbeBatch(torch.randn(4, 3, 32, 32)), health=HealthLimits(peak=1.0))
    flags = []
    for step, change in enumerate([0.0, 0.001, 0.08, 0.081, 1.0]):
        with torch.no_grad():
            noise = torch.randn(student.blocks[1].attn.qkv.weight.shape, generator=torch.Generator().manual_seed(1))
            student.blocks[1].attn.qkv.weight.copy_(teacher.blocks[1].attn.qkv.weight * (1 + change * noise * 5))
        flags.append(monitor.snapshot({"student": student, "teacher": teacher}, step=step).flags)
    flag = only(flags, "student_teacher_divergence")
    assert (flag.role, flag.heads, flag.step) == ("student", (), 4)
    assert flags[:4] == [()] * 4  # from almost nothing to a little is how every run begins


def test_limits_can_be_set_and_are_checked() -> None:
    _, flags = snapshots(collapse, limits=HealthLimits(low_entropy=0.0, peak=1.0, logit=math.inf))
    assert flags == [()] * 5
    _, flags = snapshots(kill, limits=HealthLimits(snapshots=1))
    assert only(flags, "high_entropy").step == 10
    with pytest.raises(ValueError, match=r"low_entropy=0\.9, high_entropy=0\.5; expected"):
        HealthLimits(low_entropy=0.9, high_entropy=0.5)
    with pytest.raises(ValueError, match=r"divergence_growth=1\.0; expected"):
        HealthLimits(divergence_growth=1.0)


class Dying(Distillation):
    """A training in which a head of the student dies for good at the second step."""

    def __init__(self) -> None:
        super().__init__(qkv_bias=False)
        self.student_backbone, self.teacher_backbone = sharp_vit(), sharp_vit().requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step >= 2:
            kill(self.student_backbone)


def fit(folder: Path, *callbacks: pl.Callback, **settings: Any) -> tuple[pl.Trainer, list[str]]:
    """Train; returns what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running = trainer(folder, *callbacks, **settings)
        running.fit(Dying(), loader(count=32), ckpt_path=None)
    return running, [str(w.message) for w in caught if "attention health" in str(w.message)]


def test_a_flag_in_a_run_is_told_everywhere(tmp_path: Path) -> None:
    watch = AttentionMapCallback(every_n_train_steps=1, health=ONLY_DEAD_HEADS)
    running, told = fit(tmp_path, watch)
    assert len(told) == 1
    assert "student, layer 1, head 1: entropy 1.0" in told[0]
    step = next(s.step for s in load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor") if s.flags)
    (flag,) = [f for s in load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor") for f in s.flags]
    assert (flag.kind, flag.heads, flag.step) == ("high_entropy", (1,), step)
    events = Events(tmp_path / "run" / "version_0")
    assert events.scalars("attn/health_flags") == [(n, float(n >= step)) for n in range(9)]
    assert "head 1" in events.text("attn/health/flags")
    assert running.callback_metrics["attn/health_flags"] == 1


@pytest.mark.slow
def test_flags_can_stop_a_run(tmp_path: Path) -> None:
    stop = EarlyStopping(
        "attn/health_flags", stopping_threshold=0.5, mode="max", check_on_train_epoch_end=True, patience=99
    )
    running, _ = fit(tmp_path, AttentionMapCallback(every_n_train_steps=1, health=ONLY_DEAD_HEADS), stop, max_steps=64)
    assert running.global_step == 8  # at the end of the first epoch


@pytest.mark.slow
def test_the_summary_names_the_flags(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, AttentionMapCallback(every_n_train_steps=1, health=ONLY_DEAD_HEADS))
    assert "1 health flag raised\n  student, layer 1, head 1" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_does_not_tell_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = (AttentionMapCallback(every_n_train_steps=1, health=ONLY_DEAD_HEADS) for _ in range(2))
    running, told = fit(tmp_path / "a", first)
    assert len(told) == 1
    running.save_checkpoint(tmp_path / "run.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attention health")
        trainer(tmp_path / "b", second, max_steps=12).fit(Dying(), loader(count=32), ckpt_path=tmp_path / "run.ckpt")
    assert second.monitor is not None
    assert len(second.monitor.health.flags) == 1


@pytest.mark.slow
def test_alert_on_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(tmp_path, AttentionMapCallback(every_n_train_steps=1, health=ONLY_DEAD_HEADS), logger=logger)
    logger.experiment.finish()
    (alert,) = [r.alert for r in records(tmp_path) if r.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.level) == ("attention health", "WARN")
    assert "student, layer 1, head 1: entropy 1.0" in alert.text
