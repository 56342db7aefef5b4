"""The first look at a model: only what the user must mend ends a run, and each error is told as whose it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, Watch, load_snapshots
from attn_monitor.capture import block_tokens as tokens
from attn_monitor.capture.observe import kinds
from attn_monitor.capture.observe.kinds.fused import FusedCall
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.errors import ForwardError
from attn_monitor.train import lightning_run
from tests.support.helpers import Distillation, loader, tiny_vit, trainer
from tests.support.styles import MemEffAttention, PlainViT

RUN = Path("run") / "version_0"
PROBE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 32, 48)


def fit(folder: Path, module: Any = None, **arguments: Any) -> tuple[Any, list[str]]:
    watch = AttentionMapCallback(**{"every_n_train_steps": 1, **arguments})
    running = trainer(folder, watch, max_steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running.fit(module or Distillation(), loader(), loader(8))
    assert running.global_step == 4
    return watch, [str(w.message) for w in caught if "AttentionMapCallback" in str(w.message)]


def steps(folder: Path) -> list[int]:
    return [s.step for s in load_snapshots(folder / RUN / "attn_monitor")]


class Short(Distillation):
    """Too little memory for anything in evaluation mode, a number of times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.student_backbone.register_forward_pre_hook(self.run_short)

    def run_short(self, module: nn.Module, args: Any) -> None:
        validating = self.trainer.sanity_checking or self.trainer.validating
        if not module.training and not validating and self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("probe", [None, PROBE], ids=["adopted", "given"])
def test_lack_of_memory_for_one_image_is_one_warning_and_tried_again(tmp_path: Path, probe: Tensor | None) -> None:
    _, told = fit(tmp_path, Short(2 if probe is not None else 4), probe=probe)
    assert "taking a snapshot of student failed, training goes on. OutOfMemoryError" in told[0]
    assert "works again" in told[1]
    assert len(told) == 2
    assert steps(tmp_path)[-1] == 4
    assert len(steps(tmp_path)) >= 4


def test_lack_of_memory_for_good(tmp_path: Path) -> None:
    _, told = fit(tmp_path, Short(10**6), probe=PROBE)
    assert len(told) == 2
    assert "OutOfMemoryError" in told[0]
    assert "the run has ended" in told[1]


@pytest.mark.parametrize("probe", [None, PROBE], ids=["adopted", "given"])
@pytest.mark.parametrize("place", ["FusedCall.read", "kinds.kind_of", "tokens._statistics"])
def test_a_mistake_of_ours_is_told_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, probe: Tensor | None
) -> None:
    """Even in what is called from within the model's forward; and it ends no run."""

    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("a slip of the pen")

    module, name = place.split(".")
    monkeypatch.setattr({"FusedCall": FusedCall, "kinds": kinds, "tokens": tokens}[module], name, broken)
    with pytest.raises(TypeError, match="slip of the pen"):
        AttentionRecorder(tiny_vit(), tokens=True)(PROBE)
    _, told = fit(tmp_path, probe=probe)
    assert "taking a snapshot failed, training goes on. TypeError: a slip of the pen" in told[0]
    assert not any("VisionTransformer failed" in text for text in told)
    assert len(told) == 2  # and that the run has ended without
    with pytest.raises(TypeError, match="slip of the pen"):
        fit(tmp_path / "raise", probe=probe, on_error="raise")


class Misfit(PlainViT):
    """Fails in an operation that is dispatched under our eyes, and that is no mistake of ours."""

    def forward(self, images: Tensor) -> Tensor:
        x = super().forward(images)
        return torch.bmm(x, x)


class Catching(PlainViT):
    """Answers every error of its blocks with one of its own."""

    def forward(self, images: Tensor) -> Tensor:
        try:
            return super().forward(images)
        except Exception as error:
            raise RuntimeError("the block failed") from error


def test_an_operation_that_fails_is_the_models() -> None:
    with pytest.raises(ForwardError, match=r"Misfit failed on images \(3, 3, 32, 48\)"):
        record_attention(Misfit(MemEffAttention()), IMAGES, layers="all")


def test_a_mistake_of_ours_never_reaches_a_model_that_would_catch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedCall, "read", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        record_attention(Catching(MemEffAttention()), IMAGES)


@pytest.mark.slow
def test_a_folder_that_cannot_be_found_costs_the_archive_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> Path:
        raise ConnectionError("the tracking server does not answer")

    monkeypatch.setattr(lightning_run, "run_folder", unreachable)
    watch, told = fit(tmp_path)
    assert "finding the run's folder failed, training goes on. ConnectionError" in told[0]
    assert [s.step for s in watch.monitor.history] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_an_archive_that_cannot_be_made_costs_the_archive_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    watch, told = fit(tmp_path, dirpath=tmp_path / "file" / "archive")
    assert "archive failed, training goes on. NotADirectoryError" in told[0]
    assert [s.step for s in watch.monitor.history] == [0, 1, 2, 3, 4]


class Dropping(nn.Module):
    """A block that drops a part of its result in eval mode too, as `F.dropout` without ``training=`` does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.block(x), 0.5)


def half_random() -> nn.Module:
    model = tiny_vit(depth=3)
    model.blocks[1] = Dropping(model.blocks[1])
    return model


class Supervised(Distillation):
    def __init__(self) -> None:
        super().__init__()
        self.student_backbone = self.teacher_backbone = half_random()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.student_backbone(batch).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("probe", [None, PROBE], ids=["adopted", "given"])
def test_layers_that_are_left_out_are_named_once(tmp_path: Path, probe: Tensor | None) -> None:
    targets = {"student": "student_backbone"}
    _, told = fit(tmp_path, Supervised(), probe=probe, layers="all", targets=targets)
    (text,) = (text for text in told if "leaves out" in text)
    assert 'layers="all" leaves out 1 of the layers of student' in text
    assert "layer 2 (blocks.2" in text
    assert "random even in eval mode" in text
    assert load_snapshots(tmp_path / RUN / "attn_monitor")[-1].layers_of("student") == (0, 1)


@pytest.mark.slow
def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path) -> None:
    _, told = fit(tmp_path, layers="all")
    assert told == []
    _, told = fit(tmp_path / "one", layers=0)
    assert told == []


def test_a_loop_of_ones_own_is_told_too(tmp_path: Path) -> None:
    watch = Watch({"student": half_random()}, PROBE, folder=tmp_path, layers="all")
    with pytest.warns(UserWarning, match='layers="all" leaves out 1 of the layers of student'):
        watch.step(0)
    watch.close()
    for wrong in ({"layers": []}, {"query": "CLS"}, {"metrics": "nothing"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
            Watch(tiny_vit(), folder=tmp_path, **wrong)
