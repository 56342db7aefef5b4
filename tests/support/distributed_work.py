"""What each of several processes does in test_distributed.py; every function returns what its process saw."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from attn_monitor import AttentionMapCallback, AttentionMonitor, ProbeBatch
from tests.faults.test_harmless import Manual, Recorded
from tests.support.helpers import Distillation, NoiseImages, error_of, loader, tiny_vit, trainer

RANK, PROCESSES = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
IMAGES = NoiseImages(8).images
Seen = dict[str, Any]


def attention_of(watch: AttentionMapCallback) -> Seen:
    """What a process holds of the latest snapshot, and of the past."""
    assert watch.monitor is not None
    last = watch.monitor.previous
    assert last is not None
    return {
        "step": last.step,
        "names": last.names,
        "rows": {role: last.rows(role) for role in last.roles},
        "errors": [a.verified_error for a in last.layers.values()],
        "metrics": last.scalars(),
        "probe": watch.monitor.probe.images,
        "history": [s.step for s in watch.monitor.history],
        "chunk": watch.monitor.images_at_a_time,
    }


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """A short run in all processes, with the same seed."""
    pl.seed_everything(3)
    running = trainer(folder, *callbacks, **{"strategy": "ddp", "devices": PROCESSES, "max_steps": 6, **settings})
    running.fit(module, loader(24, batch_size=2, shuffle=True), DataLoader(NoiseImages(8), batch_size=2))
    return running


def trained(folder: Path, build: Callable[[], tuple[pl.LightningModule, Seen]], *callbacks: pl.Callback) -> Seen:
    """Everything that training leaves behind."""
    pl.seed_everything(3)
    module, settings = build()
    running = fit(folder, module, *callbacks, **settings)
    states = [v for o in running.optimizers for s in o.state_dict()["state"].values() for v in s.values()]
    return {
        "weights": dict(module.state_dict()),
        "optimizer": dict(enumerate(states)),
        "losses": {"": torch.tensor(module.losses)},
        "torch": {"": torch.get_rng_state()},
    }


class Unused(Recorded):
    """Parameters that some steps do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(32, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        return loss + self.other.weight.square().sum() if batch_idx % 2 else loss


WAYS: dict[str, Callable[[], tuple[pl.LightningModule, Seen]]] = {
    "plain": lambda: (Recorded(), {}),
    "accumulation": lambda: (Recorded(), {"accumulate_grad_batches": 2, "max_steps": 4}),
    "unused parameters": lambda: (Unused(), {"strategy": DDPStrategy(find_unused_parameters=True)}),
    "static graph": lambda: (Recorded(), {"strategy": DDPStrategy(static_graph=True)}),
    "manual optimization": lambda: (Manual(), {"strategy": DDPStrategy(find_unused_parameters=True)}),
}


def harmless(folder: Path) -> Seen:
    """Each way to train (one of them in three processes), without and with a snapshot of all layers at every step."""
    seen: Seen = {}
    for way, build in list(WAYS.items())[: None if PROCESSES == 2 else 1]:
        watch = AttentionMapCallback(every_n_train_steps=1, layers="all")
        seen[way] = {
            "alone": trained(folder / way / "alone", build),
            "watched": trained(folder / way / "watched", build, watch),
            "attention": attention_of(watch),
        }
    return seen


def agreement(folder: Path) -> Seen:
    """What all processes must come to together, and failures that only one of them meets."""
    return {
        "monitored": monitored(folder / "monitored"),
        "resumed": resumed(folder / "resumed"),
        "fails": fit_with(folder / "fails", partial(Fragile, RuntimeError("deliberate"), of="both")),
        "teacher fails": fit_with(folder / "teacher", partial(Fragile, RuntimeError("deliberate"), of="teacher")),
        "memory": fit_with(folder / "memory", partial(Fragile, torch.OutOfMemoryError("deliberate"), images=2)),
        "no images": refused(folder / "no images", AttentionMapCallback(on_error="raise"), data=labels_in_process(0)),
        "other's images": refused(folder / "other's images", AttentionMapCallback(), data=labels_in_process(1)),
        "no folder": refused(folder / "no folder", AttentionMapCallback(folder / "nowhere")),
        "no layer": refused(folder / "no layer", AttentionMapCallback(IMAGES[:3], layers=7)),
    }


def monitored(folder: Path) -> Seen:
    """ModelCheckpoint and EarlyStopping read the metrics in every process."""
    best = ModelCheckpoint(folder / "best", monitor="attn/teacher/layer1/entropy", every_n_train_steps=1)
    stop = EarlyStopping("attn/student/layer1/entropy", mode="max", patience=0, min_delta=1.0)
    watch = AttentionMapCallback(every_n_train_steps=1)
    settings = {"max_steps": 30, "enable_checkpointing": True}
    module = Distillation()
    running = fit(folder, module, watch, best, stop, **settings)
    values = {k: float(v) for k, v in running.callback_metrics.items() if k.startswith("attn/")}
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    return {
        "stopped": running.global_step,
        "best": float(best.best_model_score),
        "values": values,
        "attention": attention_of(watch),
        "weights": weights,
    }


def resumed(folder: Path) -> Seen:
    """Nodes that do not see one another's disks: the archive is there for process 0 alone."""
    node = folder / f"node{RANK}"
    saved = ModelCheckpoint(folder / "ckpt", save_last=True, every_n_train_steps=2)
    first = AttentionMapCallback(every_n_train_steps=1)
    fit(node, Distillation(), first, saved, max_steps=3, enable_checkpointing=True)
    again = AttentionMapCallback(every_n_train_steps=1)
    running = trainer(node, again, strategy="ddp", devices=PROCESSES, max_steps=5)
    checkpoint = next((folder / "ckpt").glob("*step=2.ckpt"))
    running.fit(Distillation(), loader(24, batch_size=2), ckpt_path=checkpoint)
    return {"attention": attention_of(again), "archives": sorted(p.name for p in node.rglob("attn_monitor/step-*.npz"))}


class Fragile(Distillation):
    """From step 3 on, the probe's forward fails in process 1, for so many images or more."""

    def __init__(self, error: Exception, images: int = 0, of: str = "student") -> None:
        super().__init__()
        self.error, self.images, self.of = error, images, of

    def on_train_batch_end(self, *_: Any) -> None:
        super().on_train_batch_end()
        if self.global_step == 3 and self.global_rank == 1:
            models = {"student": self.student_backbone, "teacher": self.teacher_backbone}
            for model in models.values() if self.of == "both" else [models[self.of]]:
                model.blocks[0].register_forward_pre_hook(self.fail)  # however it is called

    def fail(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not module.training and (self.images == 0 or len(args[0]) == self.images):
            raise self.error


def fit_with(folder: Path, build: Callable[[], pl.LightningModule]) -> Seen:
    watch = AttentionMapCallback(IMAGES[:4], every_n_train_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running = fit(folder, build(), watch, max_steps=8, limit_val_batches=0)
    texts = [str(w.message) for w in caught if "AttentionMapCallback" in str(w.message)]
    return {"steps": running.global_step, "warnings": texts, "attention": attention_of(watch)}


def labels_in_process(rank: int) -> Callable[[], DataLoader[Tensor]]:
    """Training batches without any image in one of the processes."""
    return lambda: DataLoader(torch.arange(8) if rank == RANK else NoiseImages(8), batch_size=2)


class Ignorant(Distillation):
    """Trains on images of its own, whatever the batch is."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(IMAGES[:2], batch_idx)


def refused(folder: Path, watch: AttentionMapCallback, data: Callable[[], DataLoader[Tensor]] = loader) -> Seen:
    """What ended the run, if anything did."""
    running = trainer(folder, watch, strategy="ddp", devices=PROCESSES, max_steps=2, limit_val_batches=0)
    try:
        running.fit(Ignorant(), data())
    except Exception as error:
        dist.barrier()
        return {"error": type(error).__name__, "text": str(error), "steps": running.global_step}
    return {"error": None, "steps": running.global_step, "attention": attention_of(watch)}


def in_three(folder: Path) -> Seen:
    """`AttentionMonitor` without Lightning: whole and parts, uneven, and what goes wrong in one process."""
    seen: Seen = {"parts": {}, "trained": harmless(folder)}  # which starts the process group
    torch.manual_seed(0)
    models = {"student": tiny_vit(reg_tokens=2).eval(), "teacher": tiny_vit(reg_tokens=2).eval()}
    for count in (1, 2, 3, 4, 7):
        probe = ProbeBatch(IMAGES[:count])
        settings: Seen = {"layers": "all", "metrics": "all"}
        together = AttentionMonitor(probe, distributed=True, **settings).snapshot(models, step=0)
        alone = AttentionMonitor(probe, **settings).snapshot(models, step=0)
        seen["parts"][count] = {"together": vars(together), "alone": vars(alone)}
    probe = ProbeBatch(IMAGES[:4])
    if RANK == 0:
        AttentionMonitor(probe).snapshot(models, step=0)
        seen["batch norm"] = with_synchronised_batch_norm(probe)
    dist.barrier()
    seen["other layers"] = error_of(AttentionMonitor(probe, layers=RANK % 2, distributed=True), models)
    broken = tiny_vit()
    broken.blocks[0].register_forward_pre_hook(
        partial(fail_in, {1: torch.OutOfMemoryError("full"), 2: KeyError("deliberate")})
    )
    seen["two fail"] = error_of(AttentionMonitor(probe, distributed=True), {"backbone": broken})
    full = tiny_vit()
    full.register_forward_pre_hook(partial(fail_in, {1: torch.OutOfMemoryError("full")}))
    seen["memory"] = error_of(AttentionMonitor(probe, distributed=True), {"backbone": full})
    seen["joined"] = joined(probe)
    return seen


class BatchNormOfTokens(nn.SyncBatchNorm):
    """(..., C) normalised over the images and tokens of all processes, in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view_as(x)


def with_synchronised_batch_norm(probe: ProbeBatch) -> Seen:
    """A probe in one process alone: in training mode this module would wait for the others, or refuse the CPU."""
    model = tiny_vit()
    model.patch_embed.norm = BatchNormOfTokens(32)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    AttentionMonitor(probe).snapshot({"backbone": model}, step=0)
    return {"before": before, "after": dict(model.named_buffers()), "training": model.patch_embed.norm.training}


def fail_in(errors: dict[int, Exception], *_: Any) -> None:
    if RANK in errors:
        raise errors[RANK]


def joined(probe: ProbeBatch) -> int:
    """Uneven data under `Join`: processes end at different steps, so that each looks by itself."""
    torch.manual_seed(0)
    model = DistributedDataParallel(tiny_vit())
    optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.1), AttentionMonitor(probe)
    with Join([model]):
        for step in range(2 + RANK):
            monitor.snapshot({"backbone": model.module}, step=step)
            optimizer.zero_grad()
            model(IMAGES[:2]).square().mean().backward()
            optimizer.step()
    return len(monitor.history)


def dies(folder: Path) -> Seen:
    """Process 0 is gone between writing a file and giving it its name."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if "step-000000003" in str(target):
            os._exit(9)
        original(source, target)

    os.replace = replace  # type: ignore[assignment]
    fit(folder, Distillation(), AttentionMapCallback(every_n_train_steps=1), max_steps=50)
    return {}
