"""Read from a Lightning Trainer where its run writes, how many steps it has, and which models it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from attn_monitor.capture.backbones import find_backbones, resolve_targets
from attn_monitor.capture.role_names import teacher_is_missed
from attn_monitor.distributed import RankZero
from attn_monitor.errors import ArgumentError, NoAttentionError
from attn_monitor.measure.dense_quality import DENSE
from attn_monitor.measurements import MetricKey
from attn_monitor.trackers.naming import prefixed
from attn_monitor.trackers.registry import tracker_for
from attn_monitor.trackers.tracker import local_folder
from attn_monitor.train.lightning_images import LightningImages
from attn_monitor.train.run import Run
from attn_monitor.train.targets import NO_TEACHER, Targets

SANITY_CHECK = "finding images in the sanity check"  # the part's name in `Failures`


def rank_zero(trainer: pl.Trainer) -> RankZero:
    """Return the run's `RankZero`, by which its first process decides for all."""
    return RankZero(trainer.strategy.broadcast, trainer.global_rank)


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the run's local folder, that of the first logger that has one; for rank zero.

    Where all folders are remote, such as ``s3://bucket``, it is below the working directory.
    """
    root = local_folder(trainer.default_root_dir) or Path.cwd()
    for logger in trainer.loggers:
        folder = tracker_for(logger).run_folder
        if folder is not None:
            return folder
    if trainer.logger is None:
        return root
    # No logger has a local folder: use the one that ModelCheckpoint uses.
    logger, version = trainer.logger, trainer.logger.version
    version = version if version is None or isinstance(version, str) else f"version_{version}"
    parts = [str(part) for part in (logger.name, version) if part not in (None, "")]
    return Path(local_folder(logger.save_dir) or root, *parts)


def steps_done(trainer: pl.Trainer) -> int:
    """Count the batches that have ended in an optimizer step, which is the step axis of Lightning's loggers.

    With manual optimization every batch counts once, though ``global_step`` counts each optimizer's step.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    # Loggers use `_batches_that_stepped`, which after a checkpoint is loaded lags until the next batch.
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed)


def monitors_late_metrics(trainer: pl.Trainer, name: str) -> bool:
    """Whether a callback, such as `ModelCheckpoint`, monitors a metric that threads compute: of patches, of features.

    Args:
        trainer: the trainer.
        name: of our callback in tags.
    """
    monitored = {getattr(callback, "monitor", None) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    for tag in filter(None, monitored):
        first, _, rest = str(tag).partition("/")
        key = MetricKey.from_tag(f"attn/{rest}") if first == prefixed("attn", name) else None
        if key is not None and (key.layer is None or key.metric in DENSE):
            return True
    return False


def loss_of(trainer: pl.Trainer, outputs: Any) -> Tensor | None:
    """Return the loss of a batch as its step has returned it, None if it has not.

    Args:
        trainer: the trainer.
        outputs: what `on_train_batch_end` receives, where a loss is divided by the number of accumulated batches.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        return None
    return loss.detach() * (trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1)


def configures_late(pl_module: pl.LightningModule) -> bool:
    """Whether the module builds itself in `configure_model`, which Lightning calls after `setup`."""
    return type(pl_module).configure_model is not pl.LightningModule.configure_model


def total_steps(trainer: pl.Trainer) -> float:
    """Return the run's length in the unit of `steps_done`, infinite if Lightning does not know it."""
    try:
        total = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes from epoch to epoch
        return math.inf
    if not trainer.lightning_module.automatic_optimization and total == trainer.max_steps:
        return total / max(1, len(trainer.optimizers))  # max_steps counts the steps of each optimizer
    return total


def epochs(trainer: pl.Trainer) -> float:
    """Return how many epochs the run has at most, infinite if Lightning does not know it."""
    limit, steps, batches = trainer.max_epochs, total_steps(trainer), trainer.num_training_batches
    most = math.inf if limit is None or limit < 0 else float(limit)
    # By hand a batch may end in no step, and of an iterable the batches are not known.
    if trainer.lightning_module.automatic_optimization and math.isfinite(steps) and math.isfinite(batches):
        most = min(most, math.ceil(steps / max(1, math.ceil(batches / trainer.accumulate_grad_batches))))
    return most


@contextmanager
def find_targets(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    given: Mapping[str, str] | None,
    images: Tensor | None,
    rank_zero: RankZero,
) -> Iterator[Targets]:
    """Find the models to watch, in the run's precision.

    Backbones are found by name, alike in all processes; if that fails, rank zero finds them by running modules.

    Args:
        trainer: the trainer.
        pl_module: the module that holds the models.
        given: role to path, as the user named them; None searches.
        images: images to run modules on; None for noise.
        rank_zero: decides for all processes.
    """
    with trainer.precision_plugin.forward_context():
        paths = given
        if paths is None:
            try:
                paths = find_backbones(pl_module)
            except NoAttentionError:
                paths = rank_zero.run(lambda: find_backbones(pl_module, images))
        missed = given is None and teacher_is_missed(pl_module, paths)
        note = NO_TEACHER.format("targets={'teacher': 'path.of.it', …}") if missed else ""
        yield Targets(resolve_targets(pl_module, paths), paths, note)


def name_in_tags(names: Sequence[str | None], index: int) -> str:
    """Return a callback's name for tags: its own, else empty for the first without one, then "2", "3", …."""
    name = names[index]
    if name is None:
        number = 1 + names[:index].count(None)
        return "" if number == 1 else str(number)
    if (same := names.count(name)) > 1:
        raise ArgumentError(f"name={name!r}: {same} AttentionMapCallbacks have it, expected different ones")
    return name


def open_output(
    trainer: pl.Trainer, run: Run, images: LightningImages, dirpath: Path | Literal[False] | None, name: str | None
) -> None:
    """Set up the schedule, find images, and open the archive, at ``dirpath`` if there is one, and the loggers."""
    run.kept.schedule.start(total_steps(trainer), epochs(trainer))
    found = run.failures.result_of("finding the run's folder", lambda: run.rank_zero.run(lambda: run_folder(trainer)))
    folder, step = found or Path(trainer.default_root_dir), steps_done(trainer)
    run.kept.begin_or_continue(step, folder, run.rank_zero)
    run.probe.adopt(lambda: images.of_data_sets(trainer, run.failures), lambda: images.are_known)
    images.forget()
    archive = None if dirpath is False else dirpath or folder / prefixed("attn_monitor", name or "")
    number = 1 if name is not None else int(run.name or 1)  # the number in its tags
    fast = getattr(trainer, "fast_dev_run", False)
    run.output.open(trainer.loggers, None if fast else archive, number=number, step=step)
