"""What each of two processes does under DeepSpeed in test_deepspeed.py, on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before it is imported

import deepspeed.ops
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from attn_monitor import AttentionMapCallback
from tests.faults.test_harmless import Recorded
from tests.support.distributed_work import attention_of, fit

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first; gloo serves as well
Seen = dict[str, Any]


class OnCPU(DeepSpeedStrategy):
    """Lightning's strategy, which asks for CUDA."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed wants an index

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def trained(folder: Path, stage: int, *watch: AttentionMapCallback) -> Seen:
    """What training leaves behind, in three steps."""
    pl.seed_everything(3)
    module = Recorded()
    strategy = OnCPU(stage=stage, process_group_backend="gloo", logging_batch_size_per_gpu=2)
    fit(folder, module, *watch, strategy=strategy, max_steps=3, limit_val_batches=0)
    return {"weights": dict(module.state_dict()), "losses": {"": torch.tensor(module.losses)}}


def stages(folder: Path) -> Seen:
    """Stages 1 and 2 without and with a snapshot of all layers at every step, and what is raised by stage 3."""
    seen: Seen = {}
    for stage in (1, 2):
        watch = AttentionMapCallback(every_n_train_steps=1, layers="all")
        seen[str(stage)] = {
            "alone": trained(folder / f"{stage}" / "alone", stage),
            "watched": trained(folder / f"{stage}" / "watched", stage, watch),
            "attention": attention_of(watch),
        }
    try:
        trained(folder / "3", 3, AttentionMapCallback(on_error="raise"))
    except Exception as error:
        seen["3"] = f"{type(error).__name__}: {error}"
    return seen
