"""A short training with the callback: how long the loop is held up, by its own account and by Lightning's profiler."""

from __future__ import annotations

import copy
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attn_monitor import AttentionMapCallback, ProbeBatch
from benchmarks.measure import Spread
from benchmarks.peers import Size, timm_vit

PROBE = 8


@dataclass(frozen=True)
class Training:
    """Cost of the callback in one run of ``steps`` steps.

    ``blocked`` is one snapshot's time on the training thread over the probe's plain forward through both models,
    ``idle`` the same while nothing is drawn in the background. ``told`` is the callback's own account of the time on
    the training thread, the waiting at the end included, and ``measured`` Lightning's profiler's of all its hooks,
    both as shares of the wall time of the fit. ``longer`` is how much longer the fit takes than without the callback.
    """

    steps: int
    snapshots: int
    blocked: Spread
    idle: Spread
    told: float
    measured: float
    longer: float


class Distillation(pl.LightningModule):
    """A student that follows its own moving average, as in DINO; on noise, which takes as long as photographs."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.student_backbone = timm_vit(size)
        self.teacher_backbone = copy.deepcopy(self.student_backbone).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy between the two on the same images."""
        with torch.no_grad():
            target = (self.teacher_backbone(batch) / 0.04).softmax(-1)
        return nn.functional.cross_entropy(self.student_backbone(batch), target)

    def on_train_batch_end(self, *_: Any) -> None:
        """The moving average."""
        with torch.no_grad():
            for ours, theirs in zip(
                self.teacher_backbone.parameters(), self.student_backbone.parameters(), strict=True
            ):
                ours.lerp_(theirs, 0.01)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the student."""
        return torch.optim.AdamW(self.student_backbone.parameters(), lr=1e-4)


class PlainForwards(pl.Callback):
    """Times the probe's plain forward through both models just before each snapshot."""

    def __init__(self, images: Tensor, every: int) -> None:
        self.images, self.every = images, every
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Where the snapshot is about to be taken."""
        if trainer.global_step % self.every:
            return
        started = time.perf_counter()
        with torch.no_grad():
            pl_module.student_backbone(self.images)
            pl_module.teacher_backbone(self.images)
        self.seconds.append(time.perf_counter() - started)


class _Profiler(SimpleProfiler):
    """Lightning's profiler, which would print a long table at the end."""

    def summary(self) -> str:
        """Nothing: the durations are read from it."""
        return ""


class Drained(pl.Callback):
    """Waits, before each snapshot, until the one before has been written."""

    def __init__(self, watch: AttentionMapCallback) -> None:
        self.watch = watch

    def on_train_batch_start(self, *_: Any) -> None:
        """The publisher is there once training has begun."""
        publisher = self.watch.run.output.publisher
        if publisher is not None:
            publisher.drain()


def measure_training(size: Size, steps: int, every: int) -> Training:
    """Three runs of the same training: without the callback, with it, and with it drawing while training waits."""
    alone = _fit(size, steps, lambda images: [])[0]
    wall, profiler, plain, told = _watched(size, steps, every, wait=False)
    ours = _actions(profiler)
    taken = ours["on_train_batch_start"][::every]  # at the other steps it only asked the schedule
    _, quiet, quiet_plain, _ = _watched(size, steps, every, wait=True)
    idle = _actions(quiet)["on_train_batch_start"][::every]
    return Training(
        steps,
        len(taken) + 1,  # and one after the last step
        _after_first(taken, plain),
        _after_first(idle, quiet_plain),
        told / wall,
        sum(map(sum, ours.values())) / wall,
        wall / alone - 1,
    )


def _after_first(taken: list[float], plain: list[float]) -> Spread:
    """Ratios of all snapshots but the first, which is verified and for which files are opened."""
    return Spread.of([t / p for t, p in list(zip(taken, plain, strict=True))[1:]])


def _watched(size: Size, steps: int, every: int, *, wait: bool) -> tuple[float, SimpleProfiler, list[float], float]:
    """Wall time, profiler, plain forwards, and the seconds that the callback itself tells of at the end."""
    parts: list[Any] = []

    def callbacks(images: Tensor) -> list[pl.Callback]:
        probe = ProbeBatch(images, mean=(0.5,) * 3, std=(0.5,) * 3)
        watch = AttentionMapCallback(probe, every_n_train_steps=every)
        parts.append(PlainForwards(images, every))
        return [*([Drained(watch)] if wait else []), parts[0], watch]

    with _Told() as told:
        wall, profiler = _fit(size, steps, callbacks)
    return wall, profiler, parts[0].seconds, told.seconds


class _Told(logging.Handler):
    """Reads the line that the callback logs at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = float("nan")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "on the training thread" in message:
            ways = "on the training thread|for the first look|waiting at the end"
            parts = [float(s) for s in re.findall(rf"([\d.]+) s (?:{ways})", message)]
            self.seconds = sum(parts)

    def __enter__(self) -> _Told:
        self.loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero",)]
        for logger in self.loggers:
            logger.addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        for logger in self.loggers:
            logger.removeHandler(self)


def _actions(profiler: SimpleProfiler) -> dict[str, list[float]]:
    """Durations of all hooks of our callback, by hook, as Lightning measured them."""
    ours = {k: v for k, v in profiler.recorded_durations.items() if "AttentionMapCallback" in k}
    return {name.rpartition(".")[2]: durations for name, durations in ours.items()}


def _fit(size: Size, steps: int, callbacks: Callable[[Tensor], list[pl.Callback]]) -> tuple[float, SimpleProfiler]:
    pl.seed_everything(0)
    images = torch.randn(32, 3, size.pixels, size.pixels)
    profiler = _Profiler()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers, and flags raised by attention on noise
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, logger=TensorBoardLogger(folder), profiler=profiler,
            callbacks=callbacks(images[:PROBE]), enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        module = Distillation(size)
        loader: DataLoader[Tensor] = DataLoader(images, batch_size=size.batch)  # type: ignore[arg-type]
        with _quiet():
            started = time.perf_counter()
            trainer.fit(module, loader)
            return time.perf_counter() - started, profiler


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Lightning says about itself from the terminal; our handler still reads it."""
    logger = logging.getLogger("lightning.pytorch")
    told, logger.handlers = logger.handlers, [logging.NullHandler()]
    try:
        yield
    finally:
        logger.handlers = told
