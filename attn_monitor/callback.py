"""`AttentionMapCallback`: connect a `Session` to the hooks of Lightning's Trainer and to its checkpoints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from attn_monitor import messages
from attn_monitor.capture.backbones import check_targets, find_backbones, resolve_targets, teacher_is_missed
from attn_monitor.capture.forward import Forward
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import ArgumentError, NoAttentionError
from attn_monitor.measure.health import HealthLimits
from attn_monitor.metric_options import MetricOptions
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.options import ProbeOptions
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.snapshot import Snapshot
from attn_monitor.trackers.naming import check_name, prefixed
from attn_monitor.train import lightning_run, reports
from attn_monitor.train.lightning_images import LightningImages
from attn_monitor.train.options import OnError, RunOptions, check_dirpath
from attn_monitor.train.run_state import NO_TEACHER, Targets
from attn_monitor.train.schedule import Schedule
from attn_monitor.train.session import Session

if TYPE_CHECKING:
    Base = pl.Callback
else:
    # `pytorch_lightning`, the same package by its other name, has its own base class, which its CLI requires.
    _other = getattr(sys.modules.get("pytorch_lightning"), "Callback", None)
    Base = pl.Callback if _other is None else type("Base", (pl.Callback, _other), {})


class AttentionMapCallback(Base):
    """Log what the CLS token attends to, on fixed probe images, while a vision transformer trains.

    Args:
        probe: the images: a folder, a tensor (images, channels, H, W) normalised as the model expects, a `ProbeBatch`,
            or `ProbeOptions`, which also hold masks, mean and std. None takes evenly spaced images of the validation
            data set, else of the training data.
        targets: role to path of a backbone, such as ``{"student": "student.backbone"}``. None searches for backbones.
        layers: index in order of execution (negative from the encoder's end), module path, a list of these, or "all" of
            the encoder's layers. Select an MAE's decoder in the same module by its path.
        query: "cls", "mean" (attention received, averaged over all queries), (row, col) of a patch, or a token index.
            With "cls", a model without a CLS token is read by "mean".
        metrics: names of metrics to log, or `MetricOptions`. None is all but "distance", with every query of the last
            layer only; "all" is all, with every query of every layer.
        features: whether to keep the patch features of the drawn layers in the archive, in at most 32 dimensions, and
            to log ``gram_drift``, how far the cosines between patches have moved.
        every_n_train_steps: optimizer steps between snapshots. Steps are those of Lightning's loggers: batches that
            ended in an optimizer step, each counted once even if several optimizers step in it.
        every_n_epochs: epochs between snapshots. With neither, a run takes about 50 snapshots. There is always one
            before the first step and one after the last.
        drawing: colours, heads and sizes of pictures, see `DrawingOptions`.
        health: when a health flag is raised, see `HealthLimits`.
        forward: how to call a model if ``model(images)`` is not right: a function of (model, images), or its import
            path "package.module:function", as in YAML. Attention that runs in it is found.
        dirpath: folder of the archive, as in `ModelCheckpoint`; None is ``attn_monitor`` in the run's folder, False
            keeps no archive.
        name: distinguishes several callbacks of one trainer by tags such as ``attn-{name}/…``, ``attn_maps-{name}/…``.
            Without names, the first has plain tags and the second ``attn-2/…``. Callbacks with the same targets, layers
            and query need names for Lightning's checkpoints.
        disk_reserve: bytes; while less is free on a disk, no pictures and no archive are written to it. None is the
            smaller of 1 GB and 1 % of the disk.
        on_error: "warn" (one warning, training goes on) or "raise".
        num_images: number of images, in place of `ProbeOptions.num_images`.
        image_size: size of a folder's images, in place of `ProbeOptions.image_size`.
        threshold: share of attention mass in DINO's mask, in place of `DrawingOptions.threshold`.

    These are logged, with {role} student, teacher or backbone:
        - ``attn/{role}/layer{L}/{metric}``: means over heads and images, also in ``trainer.callback_metrics``
        - ``attn/health_flags``: how many health flags have been raised, each also a warning, a W&B alert, a text
        - ``attn_heads/{role}/layer{L}/{metric}/head{h}``: the same for each head
        - ``attn_maps/{image}``: one panel; ``attn_filmstrip/{image}``: all steps so far in one picture
        - ``attn_overview/logits``: the largest logits of all layers over the run; ``…/heads_{entropy|logits}``: with
          several layers, a heat map of all their heads; ``attn_sinks``, ``attn_monitor/sinks``: a table at the end
        - ``<log_dir>/attn_monitor/step-*.npz``: every snapshot, as `AttentionSnapshot`; the folder of another run is
          never written to

    Raises:
        ArgumentError: An argument is invalid.
        AttentionError, ProbeError, TargetError: Before the first training step, if the model cannot be watched. If none
            of probe, targets, layers, query, forward and drawn heads was given, this is a warning and training goes on.
    """

    def __init__(
        self,
        probe: ProbeOptions | str | os.PathLike[str] | Tensor | ProbeBatch | None = None,
        *,
        targets: Mapping[str, str] | None = None,
        layers: int | str | list[int | str] = -1,
        query: Literal["cls", "mean"] | int | tuple[int, int] = "cls",
        metrics: list[str] | str | MetricOptions | None = None,
        features: bool = False,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        drawing: DrawingOptions = DrawingOptions(),
        health: HealthLimits = HealthLimits(),
        forward: Forward | str | None = None,
        dirpath: str | os.PathLike[str] | Literal[False] | None = None,
        name: str | None = None,
        disk_reserve: int | None = None,
        on_error: OnError = "warn",
        num_images: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        threshold: float | None = None,
    ) -> None:
        self.options = RunOptions(
            probe,
            num_images=num_images,
            image_size=image_size,
            threshold=threshold,
            layers=layers,
            query=query,
            metrics=metrics,
            features=features,
            drawing=drawing,
            health=health,
            forward=forward,
            on_error=on_error,
            disk_reserve=disk_reserve,
        )
        if self.options.probe.data is not None:
            raise ArgumentError(
                f"probe: received a {type(probe).__name__}, expected a folder, a tensor, a ProbeBatch, or None to take "
                "images of the trainer's own data"
            )
        self.targets, self.dirpath, self.name = targets, check_dirpath(dirpath), check_name(name)
        self.schedule = Schedule(every_n_train_steps, every_n_epochs)
        self._images = LightningImages(self.options.probe.count)
        chosen = any(given is not None for given in (probe, targets, forward, self.options.drawing.drawn_heads))
        self._session = Session(
            self.options,
            self.schedule,
            warn=_warn,
            inform=_inform,
            strict=chosen or (layers, query) != (-1, "cls"),
            named=targets is not None,
        )

    @property
    def monitor(self) -> AttentionMonitor | None:
        """Return the object that takes the snapshots; None until there are images."""
        return self._session.monitor

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what can be checked before the model is on its device."""
        if stage != "fit":
            return
        name, rank_zero = self._name_in_tags(trainer), lightning_run.rank_zero(trainer)
        self._session.start(rank_zero, name=name, distributed=trainer.world_size > 1)
        if not lightning_run.configures_late(pl_module):
            self._session.attempt("finding backbones", lambda: check_targets(pl_module, self.targets))
        if not trainer.loggers:
            _warn(reports.no_logger_text(self.dirpath is not False, self.dirpath or trainer.default_root_dir))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the model's attention, on images of the probe's size, now that it is on its device."""
        if self._session.run.active:
            self._session.run.root = trainer.strategy.model
            if self.monitor is not None or self.targets is not None:
                self._session.discover(partial(self._find_targets, trainer, pl_module))

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Observe the images of the sanity check, as batches hold them and as the models receive them."""
        if trainer.sanity_checking and self.monitor is None and self._session.run.active:
            try:
                with self._find_targets(trainer, pl_module) as found:
                    seen = list(found.models.values())
            except Exception:  # reported at the first snapshot
                seen = []
            self._images.look(batch, seen, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep these images, in case the validation data set cannot be read by index."""
        if trainer.sanity_checking:
            self._images.keep()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set up the schedule, as Lightning knows the run's length now, and open the archive."""
        session, run = self._session, self._session.run
        if not run.active:
            return
        self.schedule.start(lightning_run.total_steps(trainer))
        find_folder = partial(lightning_run.run_folder, trainer)
        found = run.failures.result_of("finding the run's folder", lambda: run.rank_zero.run(find_folder))
        run_folder, step = found or Path(trainer.default_root_dir), lightning_run.steps_done(trainer)
        session.begin_or_continue(step, run_folder)
        with run.cost.of_discovery():
            session.find_probe(partial(self._images.of_data_sets, trainer, run.failures))
            run.inputs_known = run.rank_zero.run(lambda: self._images.are_known)
            self._images.forget()
        run.budget = all_of(trainer)[0]._session.run.budget  # one budget for all callbacks
        checking = (c for c in all_of(trainer) if c.options.health.check_ema)
        run.looks_at_wiring = next(checking, None) is self  # only one reports
        number = 1 if self.name is not None else int(run.name or 1)  # the number in its tags
        session.open(trainer.loggers, self._archive_folder(trainer, run_folder), number=number, step=step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot if one is due. The last step is finished, updates of an EMA included."""
        session, step = self._session, lightning_run.steps_done(trainer)
        due = session.run.active and self.schedule.due(step)
        find, targets = partial(self._images.of_batch, batch, trainer), partial(self._find_targets, trainer, pl_module)
        if due and session.ensure_probe(find, step, targets, batch):
            self._snapshot(trainer, pl_module, batch)
        else:
            session.between_steps(step)
        session.run.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample weights before the module's own hook, which often updates the teacher."""
        self._session.batch_ended()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot by epoch, before checkpoints are saved, as these may monitor its metrics."""
        step = lightning_run.steps_done(trainer)
        if self._session.run.active and self.schedule.due_at_epoch_end(trainer.current_epoch, step):
            self._snapshot(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the last snapshot, and write everything."""
        if not self._session.run.active:
            return
        step = lightning_run.steps_done(trainer)
        if self.monitor is not None and self.schedule.last_step != step:
            self._snapshot(trainer, pl_module, last=True)
        elif self.monitor is not None:
            self._session.confirm(partial(self._find_targets, trainer, pl_module), step=step)
        self._session.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what was captured for a few seconds, and report what is not written."""
        self._session.abort()
        self._let_go()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the background threads, and release the model."""
        if stage == "fit":
            self._session.end()
            self._let_go()

    @property
    def state_key(self) -> str:
        """Return a key that differs between callbacks with other targets, layers, queries or names."""
        given, named = self.options, {} if self.name is None else {"name": self.name}
        return self._generate_state_key(targets=self.targets, layers=given.layers, query=given.query, **named)

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state and the last step: a few megabytes at most, without pickled objects."""
        return self._session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the same images after the last snapshot; start afresh if the state cannot be read."""
        if not state_dict:
            return
        try:
            self._session.load_state_dict(state_dict)
        except Exception as error:  # another version's state may hold anything, and must not end a run
            _warn(
                "what the checkpoint holds of attention cannot be read, and film strips start afresh. "
                f"{type(error).__name__}: {error}"
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Warn if the checkpoint's callback had other arguments, so that its state cannot be used."""
        others = [key for key in checkpoint.get("callbacks", {}) if key.startswith(type(self).__qualname__)]
        if others and self.state_key not in others:
            _warn(
                f"the checkpoint was made with {', '.join(others)}, and this callback is {self.state_key}. It starts "
                "afresh: new probe images, and film strips from here on"
            )

    def _snapshot(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None, *, last: bool = False
    ) -> None:
        """Take a snapshot, and let other callbacks monitor its metrics."""
        targets, step = partial(self._find_targets, trainer, pl_module), lightning_run.steps_done(trainer)
        snapshot = self._session.snapshot(targets, step=step, epoch=trainer.current_epoch, batch=batch, last=last)
        if snapshot is not None:
            trainer.callback_metrics.update(_means(snapshot, self._session.run.name))

    @contextmanager
    def _find_targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Targets]:
        with trainer.precision_plugin.forward_context():
            paths = self._find_paths(pl_module) if self.targets is None else self.targets
            models = resolve_targets(pl_module, paths)
            missed = self.targets is None and teacher_is_missed(pl_module, paths)
            yield Targets(models, paths, NO_TEACHER.format("targets={'teacher': 'path.of.it', …}") if missed else "")

    def _find_paths(self, pl_module: pl.LightningModule) -> Mapping[str, str]:
        """Find backbones by name, alike in all processes; if that fails, rank zero finds them by running modules."""
        images = None if self.monitor is None else self.monitor.probe.images
        try:
            return find_backbones(pl_module)
        except NoAttentionError:
            return self._session.run.rank_zero.run(lambda: find_backbones(pl_module, images))

    def _name_in_tags(self, trainer: pl.Trainer) -> str:
        """Return the name for tags: ``name``, else empty for the first callback without one, then "2", "3", …."""
        if self.name is not None:
            same = [c for c in all_of(trainer) if c.name == self.name]
            if len(same) > 1:
                raise ValueError(
                    f"name={self.name!r}: {len(same)} AttentionMapCallbacks have it, expected different ones"
                )
            return self.name
        number = 1 + [c for c in all_of(trainer) if c.name is None].index(self)
        return "" if number == 1 else str(number)

    def _archive_folder(self, trainer: pl.Trainer, run_folder: Path) -> Path | None:
        """Return the archive's folder before it is locked; None for no archive."""
        if self.dirpath is False or getattr(trainer, "fast_dev_run", False):
            return None
        return self.dirpath or run_folder / prefixed("attn_monitor", self.name or "")

    def _let_go(self) -> None:
        """Drop images and the model's methods, so that the callback can be copied between fits."""
        self._images.forget()
        for name in ("log", "log_dict"):  # methods of the model, which Lightning gives to callbacks
            vars(self).pop(name, None)


def all_of(trainer: pl.Trainer) -> list[AttentionMapCallback]:
    """Return all callbacks of this kind in a trainer."""
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    return [c for c in callbacks if isinstance(c, AttentionMapCallback)]


def _means(snapshot: Snapshot, name: str) -> dict[str, Tensor]:
    """Return the metrics that are means over heads, by their tags."""
    return {prefixed(tag, name): torch.tensor(value) for tag, value in snapshot.scalars(heads=False).items()}


@rank_zero_only
def _warn(text: str) -> None:
    messages.warn(f"AttentionMapCallback: {text}")


def _inform(text: str) -> None:
    rank_zero_info(f"AttentionMapCallback: {text}")
