"""Global features, prototypes and loss of training's own forwards: true, bounded, and without a trace in training."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attn_monitor import AttentionMapCallback, MetricOptions, Watch, load_snapshots
from attn_monitor.background.failures import Failures
from attn_monitor.measure.global_features import measure_features
from attn_monitor.measure.prototypes import assign, measure_assignments
from attn_monitor.measurements import TRAINING
from attn_monitor.train.head_features import find_heads
from attn_monitor.train.role_features import MAX_ROWS, RoleFeatures, global_rows
from attn_monitor.train.training_watch import WINDOW, TrainingWatch
from tests.support.events import Events
from tests.support.helpers import tiny_vit, trainer

K = 96


class Crops(Dataset[list[Tensor]]):
    """Two large and one small crop of noise for each image."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(index)
        return [torch.randn(3, side, side, generator=draw) for side in (32, 32, 16)]


class Dino(pl.LightningModule):
    """Multi-crop, heads and a centre, as in DINO; remembers what it computed, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.ModuleDict(branch()), nn.ModuleDict(branch())
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, K))
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, crops: list[Tensor], index: int) -> Tensor:
        with torch.no_grad():
            targets = self.teacher["backbone"](torch.cat(crops[:2]))
            answers = self.teacher["head"](targets)
        large, small = self.student["backbone"](torch.cat(crops[:2])), self.student["backbone"](crops[2])
        out = self.student["head"](torch.cat([large, small]))
        student = out[: len(large)]
        loss = nn.functional.cross_entropy(student / 0.1, self.targets(answers))
        now = {"teacher": targets, "student": large, "answers": answers, "out": student, "loss": loss}
        self.seen.append({name: value.detach().clone() for name, value in {**now, "center": self.center}.items()})
        self.center.lerp_(answers.mean(0, keepdim=True), 0.1)
        return loss

    def targets(self, answers: Tensor) -> Tensor:
        return ((answers - self.center) / 0.07).softmax(-1)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for theirs, ours in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                theirs.lerp_(ours, 0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-2)


def branch() -> dict[str, nn.Module]:
    head = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16), nn.Linear(16, K, bias=False))
    return {"backbone": tiny_vit(), "head": head}


def fit(folder: Path, *callbacks: pl.Callback, **settings: Any) -> Dino:
    pl.seed_everything(1)
    module = Dino()
    data = DataLoader(Crops(), batch_size=8, shuffle=True)
    trainer(folder, *callbacks, **{"max_steps": 12, **settings}).fit(module, data)
    return module


def test_values_are_those_of_trainings_own_forwards(tmp_path: Path) -> None:
    """Each metric, in the archive and in the event file, follows from what the training itself has seen."""
    module = fit(tmp_path, AttentionMapCallback(every_n_train_steps=6))
    folder = tmp_path / "run" / "version_0"
    snapshot = load_snapshots(folder / "attn_monitor")[-1]
    watched = module.seen[1:5] + module.seen[6:11]  # not the first batch, nor the last one before a snapshot
    for role, out, temperature in (("student", "out", 0.1), ("teacher", "answers", 0.07)):
        found = snapshot.metrics.of_layer(role, None)
        rows = torch.cat([seen[role] for seen in watched])
        views = [torch.cat([part for s in watched for part in [s[role].chunk(2)[i]]]) for i in (0, 1)]
        expected = measure_features(rows, (views[0], views[1]))
        centres = [seen["center"].flatten() if role == "teacher" else torch.zeros(K) for seen in watched]
        centred = torch.cat([seen[out] - centre for seen, centre in zip(watched, centres, strict=True)])
        expected |= measure_assignments(assign(centred, torch.ones(len(centred), dtype=torch.bool), temperature))
        assert found["prototypes"] == K
        assert found["feature_samples"] == len(rows) == 9 * 16
        for name in expected.keys() - {"prototypes_used", "assignment_entropy_mean", "assignment_entropy_each"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (role, name)
        if role == "teacher":  # the student's head gets small crops too: of its rows, every few are read
            assert found["assignment_entropy_each"] == pytest.approx(expected["assignment_entropy_each"], rel=1e-5)
            assert found["centre_norm"] == pytest.approx(float(watched[-1]["center"].norm()), rel=1e-5)
            assert found["prototypes_used"] == pytest.approx(expected["prototypes_used"])
    loss = torch.stack([seen["loss"] for seen in module.seen[6:]]).mean()
    assert snapshot.metrics[TRAINING, None, "loss", None] == pytest.approx(float(loss), rel=1e-6)
    events = Events(folder)
    assert events.scalars("attn/teacher/rankme")[-1] == (
        12,
        pytest.approx(snapshot.metrics["attn/teacher/rankme"]),
    )
    assert [step for step, _ in events.scalars("attn/training/loss")] == [6, 12]


@pytest.mark.slow
def test_training_is_bit_identical_and_keeps_no_hook(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain")
    for options in (MetricOptions(), MetricOptions(training=False)):
        watched = fit(tmp_path / str(options.training), AttentionMapCallback(every_n_train_steps=3, metrics=options))
        assert all(torch.equal(a["loss"], b["loss"]) for a, b in zip(plain.seen, watched.seen, strict=True))
        assert all(torch.equal(a, watched.state_dict()[name]) for name, a in plain.state_dict().items())
        assert not any(m._forward_hooks for m in watched.modules())
    found = load_snapshots(tmp_path / "False" / "run" / "version_0" / "attn_monitor")[-1].metrics
    assert not any(key.layer is None for key in found)


@pytest.mark.slow
def test_hooks_are_there_in_the_window_only(tmp_path: Path) -> None:
    """Of 40 steps to the next snapshot the last but one and `WINDOW` before it are watched."""
    hooked: list[int] = []

    class Look(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
            hooked.extend([trainer.global_step] if module.teacher["backbone"]._forward_hooks else [])

    fit(tmp_path, AttentionMapCallback(every_n_train_steps=40), Look(), max_steps=60)
    assert hooked == [*range(39 - WINDOW, 39), *range(59 - WINDOW, 59)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*isinstance")
def test_a_compiled_model_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Compiled(Dino):
        def __init__(self) -> None:
            super().__init__()
            self.student["backbone"].compile(backend="eager")

    torch.compiler.reset()
    pl.seed_everything(1)
    watch = AttentionMapCallback(every_n_train_steps=2)
    with caplog.at_level("INFO"):
        trainer(tmp_path, watch, max_steps=4).fit(Compiled(), DataLoader(Crops(), batch_size=8))
    torch.compiler.reset()
    assert "global features of teacher are not measured: this process uses torch.compile" in caplog.text
    metrics = load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor")[-1].metrics
    assert {key.tag for key in metrics if key.layer is None} == {"attn/training/loss"}


class Plain(nn.Module):
    """A backbone that can be made to return anything."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()
        self.returns: Any = lambda x: x

    def forward(self, x: Tensor) -> Any:
        return self.returns(self.vit(x))


def watched(
    model: nn.Module, rounds: int = 3, failures: Failures | None = None, **inputs: Any
) -> tuple[Any, list[str]]:
    """Metrics, and what was said, of a loop that calls a model on 16 images in each of its steps."""
    said: list[str] = []
    watch = TrainingWatch(failures or Failures(), said.append)
    watch.watch_models({"backbone": model}, [model], {"backbone": True})
    for step in range(rounds):
        watch.begin(step, None, ())
        model(**(inputs or {"x": torch.randn(16, 3, 32, 32)}))
        watch.end(None)
    found = watch.values(rounds)
    assert not model._forward_hooks
    return found, said


def test_what_cannot_be_read_is_said_once() -> None:
    model = Plain()
    model.returns = lambda z: (z.square().mean(), z)
    found, said = watched(model)
    assert not found
    assert said == [
        "global features of backbone are not measured: its result, tuple of (), (16, 32), holds no features of whole "
        "images"
    ]


def test_an_error_in_a_hook_does_not_reach_training() -> None:
    class Odd(dict[str, Any]):
        def values(self) -> Any:
            raise RuntimeError("no values here")

    model, failures, news = Plain(), Failures(), list[str]()
    model.returns = lambda z: Odd(z=z)
    watched(model, failures=failures)
    failures.report(news.append)
    assert len(news) == 1
    assert "no values here" in news[0]


def test_features_are_bounded_and_of_the_latest_steps() -> None:
    role = RoleFeatures("backbone", first_is_cls=False)
    for step in range(8):
        role.begin(step, step, step - WINDOW)
        images = torch.randn(1000, 1, 2, 2)
        role.ran(nn.Identity(), (images,), {}, images.flatten(1))
    assert [chunk.step for chunk in role.chunks] == [4, 5, 6, 7]
    assert sum(len(chunk.rows) for chunk in role.chunks) <= MAX_ROWS
    role.begin(7 + WINDOW, 8, 7)
    assert [chunk.step for chunk in role.chunks] == [7]


def test_only_the_largest_images_count() -> None:
    role = RoleFeatures("student", first_is_cls=False)
    for side, value in ((16, 1.0), (32, 2.0), (16, 3.0)):
        role.ran(nn.Identity(), (torch.randn(4, 3, side, side),), {}, torch.full((4, 8), value))
    assert [float(chunk.rows.mean()) for chunk in role.chunks] == [2.0]
    sizes = [torch.randn(4, 3, side, side) for side in (16, 48)]  # as DINOv2 calls it, with a list of results
    role.ran(nn.Identity(), (sizes,), {}, [torch.zeros(4, 8), {"x_norm_clstoken": torch.ones(4, 8)}])
    assert [float(chunk.rows.mean()) for chunk in role.chunks] == [1.0]


@dataclass
class Output:
    last_hidden_state: Tensor
    pooler_output: Tensor | None = None


def test_rows_of_every_kind_of_result() -> None:
    pooled, tokens, maps = torch.randn(4, 8), torch.randn(4, 5, 8), torch.randn(4, 8, 3, 3)

    def read(output: Any, first_is_cls: bool = True) -> Tensor | None:
        return global_rows(output, 4, first_is_cls=first_is_cls)

    for output in (
        pooled,
        (pooled, tokens),
        [tokens, pooled],
        OrderedDict(tokens=tokens, cls=pooled),
        Output(tokens, pooled),
    ):
        assert read(output) is not None
        assert torch.equal(read(output), pooled)
    assert torch.equal(read(tokens), tokens[:, 0])
    assert torch.equal(read(Output(tokens), False), tokens.mean(1))
    assert torch.equal(read(maps), maps.mean((2, 3)))
    mask = torch.ones(4, 5)
    with_gradient = tokens.clone().requires_grad_()
    assert torch.equal(read((with_gradient, mask)), tokens[:, 0])  # of an MAE's encoder
    for wrong in ((torch.tensor(0.5), pooled), torch.randn(3, 8), torch.ones(4, 8).long(), None, "text", pooled[:, :1]):
        assert read(wrong) is None


def test_heads_are_found_by_what_they_are() -> None:
    module = Dino()
    found = {id(head.module) for head in find_heads([module], [module.student["backbone"], module.teacher["backbone"]])}
    assert {id(module.student["head"]), id(module.teacher["head"])} <= found
    projector = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))  # of BYOL or Barlow Twins
    assert not [head for head in find_heads([projector], []) if head.module is projector]


def test_watch_takes_the_loss(tmp_path: Path) -> None:
    model = tiny_vit()
    with Watch(model, torch.randn(2, 3, 32, 32), folder=tmp_path, every_n_train_steps=2) as watch:
        for step in range(5):
            watch.step(step, loss=float(step))
            model(torch.randn(16, 3, 32, 32))
    snapshot = load_snapshots(tmp_path / "attn_monitor")[-1]  # with what came late
    assert snapshot.metrics["attn/training/loss"] == pytest.approx(3.5)
    assert math.isfinite(snapshot.metrics["attn/backbone/rankme"])
