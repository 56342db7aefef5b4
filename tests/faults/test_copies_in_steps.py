"""Copies and pickles of models that users make within a step that is looked at hold nothing of this package."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from attn_monitor import AttentionMapCallback
from attn_monitor.train.backbone_inputs import BackboneInputs
from attn_monitor.train.weak_hooks import WeakHook
from tests.support.helpers import Distillation, loader, trainer
from tests.support.releases import since_torch

ELSEWHERE = """
import pickle, sys, torch
sys.modules["attn_monitor"] = None  # as if it were not installed
batch, expected = torch.load(sys.argv[1] + "/expected.pt")
for number, wanted in enumerate(expected):
    with open(f"{sys.argv[1]}/{number}.pkl", "rb") as file:
        assert torch.equal(pickle.load(file)(batch), wanted), number
print(len(expected))
"""
BATCH = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Copies(Distillation):
    """Copies both models wherever a step lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[nn.Module] = []
        self.pickles: list[bytes] = []

    def keep(self) -> None:
        for model in (self.student_backbone, self.teacher_backbone):
            self.copies.append(copy.deepcopy(model))
            self.pickles.append(pickle.dumps(model))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.keep()
        loss = super().training_step(batch, batch_idx)
        self.keep()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.keep()
        self.student_backbone(batch)


def hooks(model: nn.Module) -> list[Any]:
    return [
        value
        for module in model.modules()
        for name, table in vars(module).items()
        if "hooks" in name and table
        for value in table.values()
    ]


@pytest.mark.slow
def test_copies_and_pickles_hold_nothing_of_ours(tmp_path: Path) -> None:
    module = Copies()
    trainer(tmp_path / "run", AttentionMapCallback(every_n_train_steps=3), max_steps=5, num_sanity_val_steps=1).fit(
        module, loader(32), loader(4)
    )
    assert len(module.copies) >= 2 * (2 * 5 + 1)
    expected = []
    for number, (model, pickled) in enumerate(zip(module.copies, module.pickles, strict=True)):
        assert not any(isinstance(hook, WeakHook) for hook in hooks(model))
        assert b"attn_monitor" not in pickled
        (tmp_path / f"{number}.pkl").write_bytes(pickled)
        with torch.no_grad():
            expected.append(model(BATCH))
    with torch.no_grad():
        torch.save((BATCH, expected), tmp_path / "expected.pt")
    found = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert found.stdout.strip() == str(len(expected)), found.stderr


class Named(nn.Module):
    """Takes its images by name, as Transformers' models do, and changes them in place if they are not."""

    def forward(self, images: Tensor | None = None, *, pixel_values: Tensor | None = None) -> Tensor:
        given = images if pixel_values is None else pixel_values
        assert given is not None
        return given.mean() if images is None else images.zero_().mean()


def test_what_enters_is_seen_however_a_model_is_called() -> None:
    model, other = Named(), Named()
    inputs = BackboneInputs([model], BATCH, 8)
    model(pixel_values=BATCH)
    model(BATCH + 1)
    other(BATCH + 2)
    with torch.random.fork_rng():
        replica: Any = model._replicate_for_data_parallel()
    replica(BATCH + 3)
    inputs.stop()
    model(BATCH.clone())
    assert inputs.error is None
    for found, wanted in zip(inputs.entered, (BATCH, BATCH + 1, BATCH + 3), strict=True):
        assert torch.equal(found, wanted)


def test_a_run_that_is_dropped_in_a_watched_step_leaves_no_hook_behind() -> None:
    model = nn.Linear(2, 2)
    inputs = BackboneInputs([model], torch.rand(2, 3, 8, 8), 2)
    assert len(model._forward_pre_hooks) == 1
    del inputs
    gc.collect()
    assert not model._forward_pre_hooks


class CompiledInItsFirstStep(Distillation):
    """Compiles its student when it first runs, as some code does to have the right shapes."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.counter = CompileCounter()
            self.compiled = [torch.compile(self.student_backbone, backend=self.counter)]  # no submodule
        loss: Tensor = self.compiled[0](batch).square().mean()
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("watched", [False, True])
def test_a_model_that_is_compiled_in_a_watched_step_is_one_graph(tmp_path: Path, watched: bool) -> None:
    """PyTorch's warning about global hooks, too, would fail this."""
    torch._dynamo.reset()
    module = CompiledInItsFirstStep()
    callbacks = [AttentionMapCallback(every_n_train_steps=2)] if watched else []
    trainer(tmp_path, *callbacks, max_steps=5).fit(module, loader())
    assert module.counter.frame_count == 1
    torch._dynamo.reset()


@since_torch(2, 5, "a module with a hook of the standard library is compiled")
def test_a_copy_of_a_hooked_model_compiles_as_ever() -> None:
    torch._dynamo.reset()
    model, counter = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), CompileCounter()
    inputs = BackboneInputs([model], torch.rand(2, 3, 8, 8), 2)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    inputs.stop()
    torch.compile(copied, backend=counter)(torch.rand(3, 2))
    assert counter.frame_count == 1
    torch._dynamo.reset()
