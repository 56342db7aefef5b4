"""What each of several processes does in test_wiring.py; returns the flags that its process holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_monitor import AttentionMapCallback
from tests.support.helpers import loader, trainer
from tests.support.sharded_work import Sharded, two
from tests.support.wiring_runs import LIMITS, PROBE, Averaged, BeforeStep


class ShardedEarly(Sharded):
    """The average is updated at the end of training_step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        super().on_train_batch_end()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        pass


class ShardedNever(Sharded):
    def on_train_batch_end(self, *_: Any) -> None:
        pass


def several(folder: Path) -> dict[str, list[str]]:
    """Right and wrong, in both ways to use several processes."""
    ddp, fsdp = {"strategy": "ddp"}, {"strategy": two()}
    runs = {
        "DDP, right": (Averaged(), ddp),
        "DDP, before the step": (BeforeStep(), ddp),
        "FSDP, right": (Sharded("nested"), fsdp),
        "FSDP, before the step": (ShardedEarly("around"), {"strategy": two()}),
        "FSDP, never": (ShardedNever("backbone"), {"strategy": two()}),
    }
    seen = {}
    for name, (module, settings) in runs.items():
        torch.manual_seed(0)
        watch = AttentionMapCallback(PROBE, every_n_train_steps=4, dirpath=False, health=LIMITS, on_error="raise")
        running = trainer(folder, watch, **{"devices": 2, "max_steps": 8, "logger": False, **settings})
        running.fit(module, loader(32, batch_size=2))
        assert watch.monitor is not None
        seen[name] = [flag.kind for flag in watch.monitor.health.flags]
    return seen
