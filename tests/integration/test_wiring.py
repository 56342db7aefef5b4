"""Is it wired right? Each fault is told in words in a real training, and each innocent case is not."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

from attn_monitor import AttentionMapCallback, HealthLimits, Watch, load_snapshots
from attn_monitor.capture.role_names import paths_of_both_roles
from attn_monitor.commands.summary import summary
from attn_monitor.record.snapshot_file import snapshot_from_state, snapshot_state
from attn_monitor.train.ema_watch import MOMENTS
from attn_monitor.train.weak_hooks import WeakHook
from attn_monitor.train.weight_samples import Pair, WeightSamples
from tests.faults.test_harmless import assert_equal
from tests.support.events import Events
from tests.support.helpers import NoiseImages, loader, tiny_vit, trainer
from tests.support.processes import launch
from tests.support.tiers import sweep
from tests.support.wandb_runs import records
from tests.support.wiring_runs import (
    LIMITS,
    PROBE,
    RIGHT,
    WRONG,
    Averaged,
    AveragingCallback,
    BeforeStep,
    fit,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:AttentionMapCallback. this trainer has no logger"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log.. but you have no logger"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:.*isinstance"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]
told = pytest.mark.filterwarnings("ignore:AttentionMapCallback. attention health")


@told
@pytest.mark.parametrize("fault", sweep(WRONG, quick=9))
def test_faults_are_told(tmp_path: Path, fault: str) -> None:
    module, kind, words = WRONG[fault]
    flags = fit(tmp_path, module())
    assert [flag.kind for flag in flags] == [kind]
    assert words in str(flags[0])
    assert (flags[0].layer, flags[0].heads) == (None, ())
    assert flags[0].role == ("student" if kind == "student_stands_still" else "teacher")
    assert flags[0].step <= 6


@pytest.mark.parametrize("case", sweep(RIGHT, quick=9))
def test_what_is_right_is_not_told(tmp_path: Path, case: str) -> None:
    module, settings = RIGHT[case]
    assert fit(tmp_path, module(), **settings) == []


@told
def test_averages_of_two_places_after_the_step(tmp_path: Path) -> None:
    """Where a callback averages before the monitor sees the end of the batch, and the module after it."""
    watch = AttentionMapCallback(PROBE, dirpath=False, health=LIMITS)
    running = trainer(tmp_path, AveragingCallback(), watch, max_steps=6, logger=False)
    running.fit(Averaged(), loader(20, batch_size=2))
    (flag,) = watch.monitor.health.flags
    assert "averaged 2 times a step (after it), with momenta of 0.9 and 0.9, in effect 0.81" in flag.text


def test_an_average_may_hold_the_model_that_it_is_of() -> None:
    model = tiny_vit()
    held = nn.ModuleDict({"model": model, "ema": nn.ModuleDict({"online_model": model})})
    assert paths_of_both_roles(held, model) == []
    held["ema"]["ema_model"] = model
    assert paths_of_both_roles(held, model) == ["model", "ema.online_model", "ema.ema_model"]


def wiring_hooks(module: nn.Module) -> int:
    """Count the hooks that read weights: one on a layer of the teacher, one on optimizers."""
    hooks = [hook for m in module.modules() for hook in m._forward_pre_hooks.values()]
    hooks = [*hooks, *optimizers._global_optimizer_post_hooks.values()]
    methods = [hook._method() for hook in hooks if isinstance(hook, WeakHook)]
    return sum(method is not None and "ema_watch" in method.__module__ for method in methods)


def test_a_flag_goes_wherever_flags_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At once, long before the next snapshot, and once."""
    watch = AttentionMapCallback(PROBE, every_n_train_steps=6, health=LIMITS)
    running = trainer(tmp_path, watch, max_steps=10)
    with pytest.warns(UserWarning, match="attention health") as caught:
        running.fit(BeforeStep(), loader(20, batch_size=2))
    (warned,) = [str(w.message) for w in caught if "attention health" in str(w.message)]
    run = tmp_path / "run" / "version_0"
    snapshots = load_snapshots(run / "attn_monitor")
    (flag,) = [flag for snapshot in snapshots for flag in snapshot.flags]
    assert (flag.step, [s.step for s in snapshots if s.flags], snapshots[-1].flags_raised) == (4, [6], 1)
    assert warned.endswith(f"attention health\n  {flag}")
    events = Events(run)
    assert str(flag) in events.text("attn/health/flags")
    assert events.scalars("attn/health_flags") == [(0, 0.0), (6, 1.0), (10, 1.0)]
    assert running.callback_metrics["attn/health_flags"] == 1
    capsys.readouterr()
    summary(str(run))
    said = capsys.readouterr().out
    assert "One health flag was raised, the first at step 4 (average_before_step, teacher)." in said
    assert f"  average_before_step: {flag}" in said
    summary(str(run), json=True)
    assert '"layer": null' in capsys.readouterr().out
    assert snapshot_from_state(snapshot_state(snapshots[1])).flags == (flag,)


@pytest.mark.slow
@told
def test_wandb_is_alerted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    watch = AttentionMapCallback(PROBE, dirpath=False, health=LIMITS)
    fit(tmp_path, BeforeStep(), watch, logger=logger, max_steps=4)
    logger.experiment.finish()
    (alert,) = [r.alert for r in records(tmp_path) if r.WhichOneof("record_type") == "alert"]
    assert "teacher: it is averaged with a momentum of 0.9" in alert.text


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    watch = AttentionMapCallback(PROBE, dirpath=False, health=HealthLimits(check_ema=False))
    assert fit(tmp_path, BeforeStep(), watch) == []
    with pytest.raises(ValueError, match=r"stall_steps=0; expected at least 1"):
        HealthLimits(stall_steps=0)


@told
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_resumed_run_does_not_tell_again(tmp_path: Path) -> None:
    first, second = (AttentionMapCallback(PROBE, dirpath=False, health=LIMITS) for _ in range(2))
    running = trainer(tmp_path, first, max_steps=5, logger=False)
    running.fit(BeforeStep(), loader(20, batch_size=2))
    running.save_checkpoint(tmp_path / "run.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attention health")
        again = trainer(tmp_path, second, max_steps=10, logger=False)
        again.fit(BeforeStep(), loader(20, batch_size=2), ckpt_path=tmp_path / "run.ckpt")
    assert len(second.monitor.health.flags) == 1


@told
def test_several_callbacks_tell_once(tmp_path: Path) -> None:
    watches = [AttentionMapCallback(PROBE, dirpath=False, health=LIMITS, name=name) for name in "ab"]
    trainer(tmp_path, *watches, max_steps=6, logger=False).fit(BeforeStep(), loader(20, batch_size=2))
    assert [len(watch.monitor.health.flags) for watch in watches] == [1, 0]


def test_the_probe_of_another_callback_is_no_training(tmp_path: Path) -> None:
    """It runs the teacher after the first callback has begun to watch a step, in which no loss looks at the teacher."""
    watch, other = (AttentionMapCallback(PROBE, dirpath=False, health=LIMITS, name=name) for name in "ab")
    assert fit(tmp_path, RIGHT["an average for evaluation"][0](), watch, other) == []


class Copied(BeforeStep):
    """Copies itself and the monitor in the midst of a step that is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[nn.Module, Any]] = []
        self.hooks: list[int] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.hooks.append(wiring_hooks(self))
        if len(self.copies) < 2:
            watch = self.trainer.callbacks[0]
            copies = (copy.deepcopy(self.teacher_backbone), copy.deepcopy(watch))
            self.copies.append(copies if self.copies else (pickle.loads(pickle.dumps(copies[0])), copies[1]))


@pytest.mark.slow
@told
def test_copies_are_made_and_nothing_stays(tmp_path: Path) -> None:
    module, watch = Copied(), AttentionMapCallback(PROBE, dirpath=False, health=LIMITS, every_n_train_steps=20)
    assert [f.kind for f in fit(tmp_path, module, watch, max_steps=14)] == ["average_before_step"]
    assert module.hooks == [1] + [2] * 8 + [0] * 5  # eight after the first snapshot, after six of them three more
    assert wiring_hooks(module) == 0
    for model, other in (*module.copies, (module, pickle.loads(pickle.dumps(watch))), (module, copy.deepcopy(watch))):
        model.to("cpu")(PROBE) if model is not module else None
        assert [f.kind for f in fit(tmp_path, BeforeStep(), other, max_steps=4)][-1:] == ["average_before_step"]


def test_a_run_that_fails_leaves_no_hook(tmp_path: Path) -> None:
    class Failing(Averaged):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            assert wiring_hooks(self) == 1
            raise RuntimeError("the user's own mistake")

    module = Failing()
    with pytest.raises(RuntimeError, match="own mistake"):
        fit(tmp_path, module)
    assert wiring_hooks(module) == 0


@pytest.mark.parametrize("where", ["_after_step", "_before_forward", "seen", "moment"])
def test_what_fails_is_one_warning(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("deliberate")

    torch.manual_seed(0)
    alone, watched = Averaged(), Averaged()
    watched.load_state_dict(alone.state_dict())
    trainer(tmp_path, max_steps=10, logger=False).fit(alone, loader(20, batch_size=2))
    monkeypatch.setattr(f"attn_monitor.train.ema_watch._Batch.{where}", fail)
    with pytest.warns(UserWarning, match="wired failed, training goes on. RuntimeError: deliberate") as caught:
        assert fit(tmp_path, watched) == []
    assert len([w for w in caught if "deliberate" in str(w.message)]) == 1
    assert_equal({"weights": alone.state_dict()}, {"weights": watched.state_dict()})


class Compiled(BeforeStep):
    """A teacher in a function that must be compiled whole, and a student that is compiled by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = torch.compile(self._ask, backend="aot_eager", fullgraph=True)

    def _ask(self, batch: Tensor) -> Tensor:
        answer: Tensor = self.teacher_backbone(batch)
        return answer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            teacher = self.ask(batch)
        loss = nn.functional.mse_loss(self.student_backbone(batch), teacher + 1)
        self.average()
        return loss


@pytest.mark.slow
def test_compiled_models_are_compiled_as_ever(tmp_path: Path) -> None:
    """What runs in compiled code is not seen, and not told of; nothing is compiled twice."""
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert fit(tmp_path, Compiled()) == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    torch.compiler.reset()


def plain_loop(folder: Path, *, averaged: str, steps: int = 10) -> Watch:
    """A hand-written loop over a student and its teacher, each with a head."""
    torch.manual_seed(0)
    student = nn.Sequential(tiny_vit(), nn.Linear(32, 8))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer, images = torch.optim.AdamW(student.parameters(), lr=1e-2), NoiseImages(8).images
    watch = Watch({"student": student, "teacher": teacher}, PROBE, folder=folder, health=LIMITS)

    def average() -> None:
        with torch.no_grad():
            for mine, his in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.lerp_(his, 0.1)

    for step in range(steps):
        watch.step(step)
        loss = nn.functional.cross_entropy(student(images), (teacher(images) / 0.04).softmax(-1))
        optimizer.zero_grad()
        loss.backward()
        if "before" in averaged:
            average()
        optimizer.step()
        if "after" in averaged:
            average()
    watch.close(steps)
    assert watch.monitor is not None
    assert not optimizers._global_optimizer_post_hooks
    return watch


@pytest.mark.filterwarnings("ignore:attn_monitor. attention health")
@pytest.mark.parametrize(
    ("averaged", "kinds"),
    [
        ("after", []),
        ("before", ["average_before_step"]),
        ("before and after", ["average_updated_twice"]),
        ("never", ["teacher_stands_still"]),
    ],
)
def test_a_loop_of_ones_own(tmp_path: Path, averaged: str, kinds: list[str]) -> None:
    watch = plain_loop(tmp_path, averaged=averaged)
    assert [flag.kind for flag in watch.monitor.health.flags] == kinds
    assert [flag.kind for s in load_snapshots(tmp_path / "attn_monitor") for flag in s.flags] == kinds


def test_a_loop_with_one_snapshot_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two snapshots that are many steps apart a bounded number of samples is kept, and there is no flag."""
    samples, sample = [], Pair.sample

    def counted(pair: Pair) -> Any:
        samples.append(pair)
        return sample(pair)

    monkeypatch.setattr(Pair, "sample", counted)
    models = nn.ModuleDict({"student": tiny_vit(), "teacher": tiny_vit().requires_grad_(False)})
    optimizer = torch.optim.SGD(models["student"].parameters(), lr=1e-3)
    watch = Watch(models, PROBE, folder=tmp_path, health=LIMITS)
    watch.step(0)
    for _ in range(50):
        optimizer.step()
    assert MOMENTS <= len(samples) <= 2 * MOMENTS  # of weights, and of a gradient with each
    watch.step(50)
    watch.close()
    assert watch.monitor is not None
    assert watch.monitor.health.flags == []


@pytest.mark.slow
def test_several_processes(tmp_path: Path) -> None:
    """Each process has the flags that the first has found, with DDP and in its shards with FSDP."""
    for seen in launch("tests.support.wiring_work:several", tmp_path, processes=2):
        assert seen == {
            "DDP, right": [],
            "DDP, before the step": ["average_before_step"],
            "FSDP, right": [],
            "FSDP, before the step": ["average_before_step"],
            "FSDP, never": ["teacher_stands_still"],
        }


def test_models_that_have_lost_a_block_are_known_to_have() -> None:
    student, teacher = tiny_vit(), tiny_vit()
    samples = WeightSamples.of(student, teacher)
    assert samples is not None
    assert samples.are_there()
    del teacher.blocks[1]
    assert not samples.are_there()
