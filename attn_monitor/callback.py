"""`AttentionMapCallback`: the hooks of Lightning's Trainer, and what a checkpoint holds. Lightning lives here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from attn_monitor import messages
from attn_monitor.background.disk_reserve import check_reserve
from attn_monitor.capture.backbones import check_targets, find_backbones, resolve_targets, teacher_is_missed
from attn_monitor.capture.forward import Forward
from attn_monitor.capture.recorder import Verify
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import NoAttentionError
from attn_monitor.measure.health import HealthLimits
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.snapshot import Snapshot
from attn_monitor.trackers.naming import check_name, prefixed
from attn_monitor.train import lightning_run, reports
from attn_monitor.train.arguments import (
    MonitorSettings,
    OnError,
    Probe,
    ProbeSettings,
    check_dirpath,
    check_heads,
    check_on_error,
    import_forward,
)
from attn_monitor.train.lightning_images import LightningImages
from attn_monitor.train.run_state import NO_TEACHER, Targets
from attn_monitor.train.schedule import Schedule
from attn_monitor.train.session import Session

if TYPE_CHECKING:
    Base = pl.Callback
else:
    # `pytorch_lightning`, the other name of the same package, has a class of its own, which its command line asks for.
    _other = getattr(sys.modules.get("pytorch_lightning"), "Callback", None)
    Base = pl.Callback if _other is None else type("Base", (pl.Callback, _other), {})


class AttentionMapCallback(Base):
    """Logs what the CLS token attends to, on fixed probe images, while a vision transformer trains.

    Args:
        probe: the images: a folder, a tensor (images, channels, H, W) normalised as the model expects, or a
            `ProbeBatch`. None takes evenly spaced images of the validation data set, else of the training data.
        targets: role to path of a backbone, such as ``{"student": "student.backbone"}``. None searches.
        layers: index in order of execution (negative from the encoder's end), module path, a list of these, or "all" of
            the encoder's; an MAE's decoder in the same module is asked for by its path.
        query: "cls", "mean" (attention received, averaged over all queries), (row, col) of a patch, a token index. A
            model without a CLS token is looked at by "mean".
        threshold: share of attention mass that DINO's mask keeps.
        metrics: names of metrics to log; None is all but "distance", with every query read in the last layer alone;
            "all" is all, and reads every query of every layer, as do "distance", "max_logit" and "sinks" by name.
        health: when a health flag is raised, see `HealthLimits`.
        every_n_train_steps, every_n_epochs: the schedule; with neither, about 50 snapshots over the run. There is
            always one before the first step and one after the last. Steps are those of Lightning's loggers: batches
            that ended in an optimizer step, of which there is one also where several optimizers step in it.
        masks: folder of ground-truth masks for a probe folder, as `ProbeBatch.from_folder` reads it: outlines in the
            panels, and Jaccard curves.
        num_images: how many images to take from a folder or from the run's data; None is 8.
        image_size: size of images from a folder, one number or (height, width), in pixels; None is 224.
        mean, std: one number a channel, by which images are normalised. None finds out where they are the run's own or
            a tensor, and is ImageNet's for a folder.
        scale: colours in units of "uniform" attention (comparable between steps) or "minmax" (DINO's look).
        heads: heads to draw, from 0 on; None draws all.
        features: keep the patch features of the layers that are drawn in the archive, in at most 32 dimensions, and log
            ``gram_drift``, how far the patches' cosines to each other have moved.
        gram_step: since when: it is measured against the first snapshot from this step on; None is the first of all.
        verify: check row·V against the model's output: True (every snapshot), "first" (and after changes), False.
        forward: how to call a model where ``model(images)`` is not right: a function of (model, images), or its import
            path "package.module:function", as in YAML. Attention that runs in it is found.
        dirpath: folder of the archive, as `ModelCheckpoint` has it; None is ``attn_monitor`` in the run's folder, False
            keeps no archive.
        name: tells several callbacks of one trainer apart, by tags such as ``attn-{name}/…``, ``attn_maps-{name}/…``.
            Without, the first has plain tags and the second ``attn-2/…``. Lightning's checkpoints need names where
            targets, layers and query are the same.
        disk_reserve: bytes; while less is free on a disk, no pictures and no archive are written to it. None: the
            smaller of 1 GB and 1 % of the disk.
        on_error: "warn" (one warning, training goes on) or "raise".

    Logged, with {role} student, teacher or backbone:
        - ``attn/{role}/layer{L}/{metric}``: means over heads and images, also in ``trainer.callback_metrics``
        - ``attn/health_flags``: how many health flags have been raised, each also a warning, a W&B alert, a text
        - ``attn_heads/{role}/layer{L}/{metric}/head{h}``: the same for each head
        - ``attn_maps/{image}``: one panel; ``attn_filmstrip/{image}``: all steps so far in one picture
        - ``attn_overview/logits``: the largest logits of all layers over the run; ``…/heads_{entropy|logits}``: with
          several layers, a heat map of all their heads; ``attn_sinks``, ``attn_monitor/sinks``: a table at the end
        - ``<log_dir>/attn_monitor/step-*.npz``: every snapshot, as `AttentionSnapshot`; the folder of another run is
          never written to

    Raises:
        AttentionError, ProbeError, TargetError: before the first training step, with the argument, what was received,
            what was expected and what to do. Where none of probe, targets, layers, query, forward and heads was given,
            a model that cannot be watched is a warning, and trains without being watched.
    """

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        targets: Mapping[str, str] | None = None,
        layers: int | str | list[int | str] = -1,
        query: Literal["cls", "mean"] | int | tuple[int, int] = "cls",
        threshold: float = 0.6,
        metrics: list[str] | str | None = None,
        health: HealthLimits = HealthLimits(),
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        masks: str | os.PathLike[str] | None = None,
        num_images: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: Literal["uniform", "minmax"] = "uniform",
        heads: list[int] | None = None,
        features: bool = False,
        gram_step: int | None = None,
        verify: Verify = True,
        forward: Forward | str | None = None,
        dirpath: str | os.PathLike[str] | Literal[False] | None = None,
        name: str | None = None,
        disk_reserve: int | None = None,
        on_error: OnError = "warn",
    ) -> None:
        images = ProbeSettings(probe, num_images=num_images, image_size=image_size, masks=masks, mean=mean, std=std)
        settings = MonitorSettings(
            layers=layers,
            query=query,
            threshold=threshold,
            metrics=metrics,
            health=health,
            verify=verify,
            features=features,
            gram_step=gram_step,
        )
        self.probe, self.num_images, self.targets = probe, images.num_images, targets
        self.layers, self.query, self.health = settings.layers, settings.query, settings.health
        self.forward, self.dirpath, self.name = import_forward(forward), check_dirpath(dirpath), check_name(name)
        self.schedule = Schedule(every_n_train_steps, every_n_epochs)
        chosen = any(given is not None for given in (probe, targets, self.forward, heads))
        self._images = LightningImages(self.num_images)
        self._session = Session(
            settings,
            images,
            self.schedule,
            DrawingOptions(threshold, scale, check_heads(heads)),
            forward=self.forward,
            on_error=check_on_error(on_error),
            warn=_warn,
            inform=_inform,
            strict=chosen or (layers, query) != (-1, "cls"),
            named=targets is not None,
            disk_reserve=check_reserve(disk_reserve),
        )

    @property
    def monitor(self) -> AttentionMonitor | None:
        """What takes the snapshots, once there are images."""
        return self._session.monitor

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that can be checked before training."""
        if stage != "fit":
            return
        name, rank_zero = self._name_in_tags(trainer), lightning_run.rank_zero(trainer)
        self._session.start(rank_zero, name=name, distributed=trainer.world_size > 1)
        if not lightning_run.configures_late(pl_module):
            self._session.attempt("finding backbones", lambda: check_targets(pl_module, self.targets))
        if not trainer.loggers:
            _warn(reports.no_logger_text(self.dirpath is not False, self.dirpath or trainer.default_root_dir))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is on its device now: discover its attention, on images of the probe's size."""
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
        """Look at the images of the sanity check, and at what the models get of them."""
        if trainer.sanity_checking and self.monitor is None and self._session.run.active:
            try:
                with self._find_targets(trainer, pl_module) as found:
                    seen = list(found.models.values())
            except Exception:  # it is told at the first snapshot
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
        """Keep them, for a validation data set that cannot be asked for others."""
        if trainer.sanity_checking:
            self._images.keep()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay out the schedule, now that Lightning knows how long the run is, and choose what is written to."""
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
        run.budget = all_of(trainer)[0]._session.run.budget  # a minute for all of them together
        run.looks_at_wiring = next((c for c in all_of(trainer) if c.health.check_ema), None) is self  # one tells
        number = 1 if self.name is not None else int(run.name or 1)  # the same number as in its tags
        session.open(trainer.loggers, self._archive_folder(trainer, run_folder), number=number, step=step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: the last one is finished, averages of weights included, and the next has not begun."""
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
        """Before the module's own hook, in which most average the teacher."""
        self._session.batch_ended()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Snapshots by epoch are taken before checkpoints are saved, so that these can monitor them."""
        step = lightning_run.steps_done(trainer)
        if self._session.run.active and self.schedule.due_at_epoch_end(trainer.current_epoch, step):
            self._snapshot(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last snapshot, and everything written."""
        if not self._session.run.active:
            return
        step = lightning_run.steps_done(trainer)
        if self.monitor is not None and self.schedule.last_step != step:
            self._snapshot(trainer, pl_module, last=True)
        elif self.monitor is not None:
            self._session.confirm(partial(self._find_targets, trainer, pl_module), step=step)
        self._session.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what was captured before the failure, for a few seconds, and say what is not written."""
        self._session.abort()
        self._let_go()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the background threads, and let go of the model."""
        if stage == "fit":
            self._session.end()
            self._let_go()

    @property
    def state_key(self) -> str:
        """Distinct for callbacks that look at different things, so that several can be used at once."""
        named = {} if self.name is None else {"name": self.name}
        return self._generate_state_key(targets=self.targets, layers=self.layers, query=self.query, **named)

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state and the last step: a few megabytes at most, without pickled objects."""
        return self._session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same images from the step after the last snapshot; start afresh if it cannot be read."""
        if not state_dict:
            return
        try:
            self._session.load_state_dict(state_dict)
        except Exception as error:  # another version's may hold anything, and must not end a run
            _warn(
                "what the checkpoint holds of attention cannot be read, and film strips start afresh. "
                f"{type(error).__name__}: {error}"
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so when the checkpoint comes from a callback with other arguments, whose state cannot be used."""
        others = [key for key in checkpoint.get("callbacks", {}) if key.startswith(type(self).__qualname__)]
        if others and self.state_key not in others:
            _warn(
                f"the checkpoint was made with {', '.join(others)}, and this callback is {self.state_key}. It starts "
                "afresh: new probe images, and film strips from here on"
            )

    def _snapshot(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None, *, last: bool = False
    ) -> None:
        """Take one; its metrics can be monitored by other callbacks from now on."""
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
        """By names, the same in all processes; where these fail, rank zero runs modules, which may fail there alone."""
        images = None if self.monitor is None else self.monitor.probe.images
        try:
            return find_backbones(pl_module)
        except NoAttentionError:
            return self._session.run.rank_zero.run(lambda: find_backbones(pl_module, images))

    def _name_in_tags(self, trainer: pl.Trainer) -> str:
        """What follows the first part of every tag: the name, else a number from the second callback without one on."""
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
        """The folder that is asked for; None for no archive."""
        if self.dirpath is False or getattr(trainer, "fast_dev_run", False):
            return None
        return self.dirpath or run_folder / prefixed("attn_monitor", self.name or "")

    def _let_go(self) -> None:
        """Between fits there are settings and state alone: no model, no thread, nothing that cannot be copied."""
        self._images.forget()
        for name in ("log", "log_dict"):  # methods of the model, which Lightning gives to callbacks
            vars(self).pop(name, None)


def all_of(trainer: pl.Trainer) -> list[AttentionMapCallback]:
    """Every callback of this kind that a trainer has."""
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    return [c for c in callbacks if isinstance(c, AttentionMapCallback)]


def _means(snapshot: Snapshot, name: str) -> dict[str, Tensor]:
    """Metrics that are means over heads, by their tags."""
    return {prefixed(tag, name): torch.tensor(value) for tag, value in snapshot.scalars(heads=False).items()}


@rank_zero_only
def _warn(text: str) -> None:
    messages.warn(f"AttentionMapCallback: {text}")


def _inform(text: str) -> None:
    rank_zero_info(f"AttentionMapCallback: {text}")
