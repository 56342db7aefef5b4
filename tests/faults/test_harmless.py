"""Training with the monitor at every step equals training without it, to the bit, in every way people train."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attn_monitor import AttentionMapCallback, load_snapshots
from tests.support.helpers import Distillation, NoiseImages, tiny_vit, trainer
from tests.support.tiers import sweep

Built = tuple[pl.LightningModule, dict[str, Any], list[pl.Callback]]


class Recorded(Distillation):
    """Dropout, drop-path, BatchNorm, and random draws of its own; remembers every loss."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**{"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.2, **changes})
        self.norm = nn.BatchNorm1d(32)
        self.losses: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        noise = torch.randn_like(batch) * random.random() * np.random.random()  # noqa: NPY002
        student = self.head(self.norm(self.student_backbone(batch + 0.1 * noise)))
        with torch.no_grad():
            teacher = self.head(self.teacher_backbone(batch))
        loss = nn.functional.cross_entropy(student, (teacher / 0.04).softmax(-1))
        self.losses.append(float(loss.detach()))
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return self.loss(batch)


class Manual(Recorded):
    """Manual optimization with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.AdamW(self.student_backbone.parameters(), lr=1e-2),
            torch.optim.SGD(self.head.parameters(), lr=1e-1, momentum=0.9),
        ]


class WithSGD(Recorded):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Single(pl.LightningModule):
    """A backbone alone, averaged by Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.losses = tiny_vit(drop_path_rate=0.2), []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.vit(batch).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.vit(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Draws(pl.Callback):
    """A user's callback that draws random numbers in every hook around a batch."""

    def on_train_batch_start(self, *_: Any) -> None:
        torch.rand(3), random.random(), np.random.random()  # noqa: NPY002

    on_train_batch_end = on_train_batch_start


def checkpointed() -> Recorded:
    module = Recorded()
    module.student_backbone.set_grad_checkpointing()
    return module


def half_frozen() -> Recorded:
    module = Recorded()
    module.student_backbone.blocks[0].requires_grad_(False).eval()
    return module


def compiled() -> Recorded:
    module = Recorded()
    module.student_backbone.compile(backend="aot_eager")
    return module


def averaging() -> pl.Callback:
    if not hasattr(pl.callbacks, "WeightAveraging"):
        pytest.skip("WeightAveraging came with Lightning 2.6")
    return pl.callbacks.WeightAveraging()


RUNS: dict[str, Callable[[], Built]] = {
    "adamw": lambda: (Recorded(), {}, []),
    "sgd": lambda: (WithSGD(), {}, []),
    "accumulation and validation": lambda: (Recorded(), {"accumulate_grad_batches": 2, "val_check_interval": 3}, []),
    "manual optimization": lambda: (Manual(), {"max_steps": 12}, []),
    "weight averaging": lambda: (Single(), {}, [averaging()]),
    "bf16 autocast": lambda: (Recorded(), {"precision": "bf16-mixed"}, []),
    "bf16 weights": lambda: (Recorded(), {"precision": "bf16-true"}, []),
    "activation checkpointing": lambda: (checkpointed(), {}, []),
    "partly frozen, mixed modes": lambda: (half_frozen(), {}, []),
    "callback that draws": lambda: (Recorded(), {}, [Draws()]),
    "compiled": lambda: (compiled(), {}, []),
    "gradient clipping": lambda: (Recorded(), {"gradient_clip_val": 0.1}, []),
}


def run(folder: Path, build: Callable[[], Built], *watch: pl.Callback, workers: int = 0) -> dict[str, Any]:
    torch.compiler.reset()
    pl.seed_everything(3, workers=True)
    module, settings, callbacks = build()
    data = DataLoader(NoiseImages(), batch_size=4, shuffle=True, num_workers=workers, multiprocessing_context=None)
    running = trainer(folder, *watch, *callbacks, **{"max_steps": 6, **settings})
    running.fit(module, data, DataLoader(NoiseImages(8), batch_size=4))
    states = [value for o in running.optimizers for s in o.state_dict()["state"].values() for value in s.values()]
    return {
        "weights": module.state_dict(),
        "optimizer": dict(enumerate(states)),
        "losses": {"": torch.tensor(module.losses, dtype=torch.float64)},
        "torch": {"": torch.get_rng_state()},
        "python": {"": torch.tensor(random.getstate()[1][:-1], dtype=torch.int64)},
        "numpy": {"": torch.from_numpy(np.random.get_state()[1].astype(np.int64))},  # noqa: NPY002
        "flags": {str(i): torch.tensor(m.training) for i, m in enumerate(module.modules())},
    }


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for kind in one:
        assert one[kind].keys() == other[kind].keys()
        for name, value in one[kind].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[kind][name])), (kind, name)


@pytest.mark.filterwarnings(
    "ignore:Found .* module.s. in eval mode",
    "ignore:.*lr_scheduler.step",
    "ignore:.*isinstance",
    "ignore:`torch.cpu.amp.autocast:FutureWarning",  # by torch.utils.checkpoint of PyTorch 2.4
)
@pytest.mark.parametrize("name", sweep(RUNS, quick=2))
def test_bit_identical(tmp_path: Path, name: str) -> None:
    plain = run(tmp_path / "plain", RUNS[name])
    watch = AttentionMapCallback(every_n_train_steps=1, layers="all")
    assert_equal(plain, run(tmp_path / "watched", RUNS[name], watch))
    assert len(load_snapshots(tmp_path / "watched" / "run" / "version_0" / "attn_monitor")) >= 7


@pytest.mark.slow
def test_bit_identical_with_workers(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", RUNS["adamw"], workers=2)
    watch = AttentionMapCallback(every_n_train_steps=1)
    assert_equal(plain, run(tmp_path / "watched", RUNS["adamw"], watch, workers=2))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [{}, {"every_n_train_steps": 2}, {"every_n_epochs": 1}])
def test_bit_identical_at_every_schedule(tmp_path: Path, schedule: dict[str, int]) -> None:
    plain = run(tmp_path / "plain", RUNS["adamw"])
    assert_equal(plain, run(tmp_path / "watched", RUNS["adamw"], AttentionMapCallback(**schedule)))


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """A callback that draws one random number is found out."""

    class Careless(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            torch.rand(1)

    with pytest.raises(AssertionError):
        assert_equal(run(tmp_path / "a", RUNS["adamw"]), run(tmp_path / "b", RUNS["adamw"], Careless()))
