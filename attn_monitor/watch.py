"""`Watch`: record attention maps in your own training loop, in three lines and as safely as in Lightning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attn_monitor import distributed, messages
from attn_monitor.attention_snapshot import AttentionSnapshot
from attn_monitor.background.failures import Failures
from attn_monitor.capture.backbones import find_backbones
from attn_monitor.capture.layer_selection import Layers, QuerySpec
from attn_monitor.capture.observe.forward import Forward, is_sharded
from attn_monitor.capture.role_names import teacher_is_missed
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import ArgumentError, NoAttentionError, UnsupportedAttentionError
from attn_monitor.measure.health import HealthLimits
from attn_monitor.metric_options import MetricOptions
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.labelled import EvaluationOptions, Labelled
from attn_monitor.probe.options import Images, ProbeOptions
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.trackers.picture_plan import KEEP
from attn_monitor.trackers.publisher import Heads
from attn_monitor.trackers.registry import check_loggers
from attn_monitor.trackers.tracker import local_folder
from attn_monitor.train.kept import Kept
from attn_monitor.train.options import OnError, RunOptions
from attn_monitor.train.probe_search import TRAINING_CAPTION, probe_from_batch, probe_from_source
from attn_monitor.train.run import Run
from attn_monitor.train.schedule import Schedule
from attn_monitor.train.targets import NO_TEACHER, SnapshotRequest, Targets, check_models


class Watch:
    """Record the attention of models while they train, and write it to loggers and to an archive.

    At its end, ``with`` closes the watch, or aborts it after an exception. A failure is a warning, and training goes
    on; only ``on_error="raise"`` ends it. In a process group, rank zero takes the snapshots and the other processes do
    nothing.

    Args:
        models: a module to search for backbones and their roles, or role to module.
        probe: a folder, a tensor (images, channels, H, W) of normalised images, a `ProbeBatch`, a data set or its
            loader, or `ProbeOptions`. Data with ``__len__`` and ``__getitem__`` give evenly spaced images, others their
            first batch. None takes the first ``batch`` that `step` receives.
        loggers: a list of TensorBoard ``SummaryWriter``, W&B runs, or anything with ``log_metrics``.
        folder: the run's folder; the archive is in ``attn_monitor`` below it. None keeps no archive.
        every_n_train_steps: optimizer steps between snapshots; None is as in `AttentionMapCallback`, about 50 in a run.
            Without ``total_steps`` the distances grow: steps 1, 2, 4, …, 64, then 50 steps and more.
        total_steps: length of the run in optimizer steps, None if unknown.
        layers: this and the arguments after it are those of `AttentionMapCallback`.

    Raises:
        ArgumentError: An argument is invalid, a logger takes nothing, or neither ``loggers`` nor ``folder`` is given.
        ProbeError: The images cannot be used.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from timm.models import VisionTransformer
        >>> model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> images, folder = torch.randn(2, 3, 32, 32), TemporaryDirectory()
        >>> with Watch(model, images, folder=folder.name, every_n_train_steps=1) as watch:
        ...     for step in range(2):
        ...         snapshot = watch.step(step)  # the number of optimizer steps done; then train
        >>> snapshot.step
        1
        >>> folder.cleanup()
    """

    def __init__(
        self,
        models: nn.Module | Mapping[str, nn.Module],
        probe: ProbeOptions | Images | None = None,
        *,
        loggers: Sequence[Any] = (),
        folder: str | os.PathLike[str] | None = None,
        every_n_train_steps: int | None = None,
        total_steps: float | None = None,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        metrics: MetricOptions | Sequence[str] | str | None = None,
        features: bool = False,
        evaluation: EvaluationOptions | Labelled | None = None,
        drawing: DrawingOptions = DrawingOptions(),
        health: HealthLimits = HealthLimits(),
        forward: Forward | None = None,
        heads: Heads = "pictures",
        keep_pictures: int | None = KEEP,
        on_error: OnError = "warn",
        num_images: int | None = None,
        image_size: int | tuple[int, ...] | None = None,
        threshold: float | None = None,
    ) -> None:
        # Rank zero of this process alone: the others do nothing, and need no logger.
        rank_zero, watched = distributed.RankZero(), distributed.is_rank_zero()
        if watched and not loggers and folder is None:
            raise ArgumentError("loggers=(), folder=None: expected a place to write to, such as folder='runs/1'")
        if folder is not None and local_folder(folder) is None:
            raise ArgumentError(f"folder={folder!r}: expected a local folder, such as 'runs/1', or None")
        self.options = RunOptions(
            probe,
            num_images=num_images,
            image_size=image_size,
            threshold=threshold,
            layers=layers,
            query=query,
            metrics=metrics,
            features=features,
            evaluation=evaluation,
            drawing=drawing,
            health=health,
            forward=forward,
            heads=heads,
            keep_pictures=keep_pictures,
            on_error=on_error,
        )
        self.models, self.loggers, self.folder = (
            check_models(models),
            check_loggers(loggers) if watched else [],
            None if folder is None else Path(folder),
        )
        self.kept = Kept(self.options, Schedule(every_n_train_steps))
        self.kept.schedule.start(total_steps or float("inf"))
        self.run: Run | None = Run(self.kept, rank_zero, warn=_warn, inform=_inform, watched=watched)
        if isinstance(models, nn.Module):
            self.kept.set_enclosing(models)
        else:
            self.kept.set_enclosing(None, tuple(models.values()))

    @property
    def monitor(self) -> AttentionMonitor | None:
        """Return the object that takes the snapshots; None until there are images."""
        return self.kept.monitor

    @property
    def active(self) -> bool:
        """Whether snapshots are taken, which is on rank zero, of a model that can be watched, until `close`."""
        return self.run is not None and self.run.active

    def step(
        self, step: int, *, batch: Any = None, epoch: int = 0, loss: Tensor | float | None = None
    ) -> AttentionSnapshot | None:
        """Take a snapshot if one is due. Call this between any two optimizer steps.

        Args:
            step: optimizer steps done, from 0 on.
            batch: what the next step receives, to take images of and to compare the probe with.
            epoch: from 0 on.
            loss: of the step before, which the verdict reads; its tensor is read with the next snapshot.

        Returns:
            The snapshot, None if none was due or it failed.
        """
        if self.run is None:
            return None
        self.run.record_loss(loss)
        self.run.compare_probe()
        if self.run.due(step):
            taken = self._snapshot(self.run, step, batch, epoch)
        else:
            taken = None
            self.run.between_steps(step)
        self.run.begin_batch(step, batch)
        return taken

    def close(self, step: int | None = None) -> None:
        """Take a last snapshot at this step unless there is one, write everything, and stop watching."""
        run = self.run
        if run is None:
            return
        try:
            run.compare_probe()
            if step is not None and run.active and step != self.kept.schedule.last_step:
                self._snapshot(run, step, None, 0, last=True)
            elif step is not None and run.active:
                run.confirm(self._find_targets, step=step)
            run.close()
        finally:
            run.end()
            self.run = None

    def abort(self) -> None:
        """Stop watching after an exception: write what was captured for a few seconds, and report what is not."""
        if self.run is not None:
            self.run.abort()
        self.run = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        self.close() if kind is None else self.abort()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values for a checkpoint, loadable with ``weights_only=True``."""
        return self.kept.state_dict(Failures() if self.run is None else self.run.failures)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the same images, in the same archive, from the step after the last snapshot."""
        if state and self.run is not None:
            load = partial(self.kept.load_state_dict, state)
            if text := self.run.failures.result_of("reading the state of a checkpoint", load):
                _warn(text)
            self.run.errors.report()

    def _snapshot(self, run: Run, step: int, batch: Any, epoch: int, *, last: bool = False) -> AttentionSnapshot | None:
        if not run.probe.ensure(partial(self._find_images, batch), step, self._find_targets, batch):
            return None
        if not run.output.opened:
            folder = None if self.folder is None else self.folder / "attn_monitor"
            run.output.open(self.loggers, folder, step=step, until=step - 1)  # the snapshot of this step is retaken
        return run.snapshot(SnapshotRequest(self._find_targets, step, epoch, batch, last))

    def _find_images(self, batch: Any) -> ProbeBatch:
        """Take images of the data set or loader that was given, else of a batch."""
        source, count = self.options.probe.data, self.options.probe.count
        if source is None:
            return probe_from_batch(batch, count, caption=TRAINING_CAPTION)

        if batch is None or self.run is None:
            return probe_from_source(source, count)
        find = partial(probe_from_source, source, count)
        found = self.run.failures.result_of("finding images of the data", find)
        return found or probe_from_batch(batch, count, caption=TRAINING_CAPTION)

    @contextmanager
    def _find_targets(self) -> Iterator[Targets]:
        images = None if self.monitor is None else self.monitor.probe.images
        if isinstance(self.models, nn.Module):
            paths, models = find_backbones(self.models, images), self.models
            missed = teacher_is_missed(models, paths)
            note = NO_TEACHER.format("Watch({'student': …, 'teacher': …})") if missed else ""
            targets = Targets({role: models.get_submodule(path) for role, path in paths.items()}, paths, note)
        else:
            paths = {role: _only_backbone(model, images) for role, model in self.models.items()}
            targets = Targets({role: m.get_submodule(paths[role]) for role, m in self.models.items()}, paths)
        if distributed.is_distributed() and any(map(is_sharded, targets.models.values())):
            raise UnsupportedAttentionError(
                "Watch looks in the first process alone, and this model's parameters are spread over several. Use "
                "AttentionMonitor(distributed=True) with forward_within, in every process"
            )
        yield targets


def _only_backbone(model: nn.Module, images: Tensor | None) -> str:
    """Return the path of the one backbone in a module, such as a multi-crop wrapper; else empty, the module itself."""
    try:
        found = find_backbones(model, images)
    except NoAttentionError:
        return ""
    return next(iter(found.values())) if len(found) == 1 else ""


def _warn(text: str) -> None:
    messages.warn(f"attn_monitor: {text}")


def _inform(text: str) -> None:
    messages.inform(f"attn_monitor: {text}")
