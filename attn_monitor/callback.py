"""`AttentionMapCallback`: connect a `Run` to the hooks of Lightning's Trainer and to its checkpoints."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_monitor import messages
from attn_monitor.background.failures import Failures
from attn_monitor.capture.backbones import check_paths
from attn_monitor.capture.observe.forward import Forward
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import ArgumentError
from attn_monitor.extras import needs
from attn_monitor.measure.health import HealthLimits
from attn_monitor.metric_options import MetricOptions
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.labelled import EvaluationOptions
from attn_monitor.probe.options import ProbeOptions
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.trackers.naming import check_name, prefixed
from attn_monitor.trackers.picture_plan import KEEP
from attn_monitor.trackers.publisher import Heads
from attn_monitor.train import reports
from attn_monitor.train.kept import Kept
from attn_monitor.train.options import OnError, RunOptions, check_dirpath
from attn_monitor.train.run import Run
from attn_monitor.train.schedule import Schedule
from attn_monitor.train.targets import FindTargets, SnapshotRequest, check_targets

with needs("lightning", "AttentionMapCallback"):
    import lightning.pytorch as pl
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

    from attn_monitor.train import lightning_run
    from attn_monitor.train.lightning_images import LightningImages

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
        evaluation: images with labels, by which kNN and a linear probe judge the backbones at snapshots: a folder with
            a folder for each class, tensors (images, labels), a data set of (image, label), or `EvaluationOptions`.
        every_n_train_steps: optimizer steps between snapshots. Steps are those of Lightning's loggers: batches that
            ended in an optimizer step, each counted once even if several optimizers step in it.
        every_n_epochs: epochs between snapshots. With neither, a run takes 50 snapshots, a short one about ten, and
            fewer where they would take more than a second and 5 % of the loop's time. There is always one before the
            first step and one after the last.
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
        heads: "curves" logs the metrics of each head as curves, with charts under TensorBoard's Custom Scalars;
            "pictures" shows heads in pictures, in the player and in the archive alone.
        keep_pictures: how many snapshots get pictures in loggers, evenly spread, and the last one; where the length of
            the run is not known, so many at each distance, which doubles. None is all. The archive has every snapshot.
        on_error: "warn" (one warning, training goes on) or "raise".
        num_images: number of images, in place of `ProbeOptions.num_images`.
        image_size: size of a folder's images, in place of `ProbeOptions.image_size`.
        threshold: share of attention mass in DINO's mask, in place of `DrawingOptions.threshold`.

    These are logged, with {role} student, teacher or backbone:
        - ``attn/{role}/layer{L}/{metric}``: means over heads and images, also in ``trainer.callback_metrics`` for
          ``ModelCheckpoint(monitor=…)``; dense metrics only if a callback monitors one, and are computed at once then
        - ``attn/{role}/{metric}``: global features and prototypes in training's forwards; ``attn/training/loss``
        - ``attn/health_flags``: how many health flags have been raised, each also a warning, a W&B alert, a text
        - ``attn_heads/{role}/layer{L}/{metric}/head{h}``: the same for each head, with ``heads="curves"``
        - ``attn_maps/{image}``: one panel; ``attn_filmstrip/{image}``: the run so far, at growing distances
        - ``attn_overview/logits``: the largest logits of all layers over the run; ``…/heads_{entropy|logits}``: with
          several layers, a heat map of all their heads; ``attn_sinks``, ``attn_monitor/sinks``: a table at the end
        - ``<log_dir>/attn_monitor/step-*.npz``: every snapshot, as `AttentionSnapshot`; the folder of another run is
          never written to

    Raises:
        ArgumentError: An argument is invalid.
        AttentionError, ProbeError, TargetError: Before the first training step, if the model cannot be watched. If none
            of probe, targets, layers, query, forward and drawn heads was given, this is a warning and training goes on.

    Example:
        >>> callback = AttentionMapCallback("photos", image_size=96, every_n_train_steps=500)
        >>> trainer = pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> AttentionMapCallback(threshold=60)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        attn_monitor.errors.ArgumentError: threshold=60: expected a share of attention mass above 0 and up to 1, ...
    """

    yields: ClassVar[bool] = False  # whether it is inactive in a trainer that has a callback that does not

    def __init__(
        self,
        probe: ProbeOptions | str | os.PathLike[str] | Tensor | ProbeBatch | None = None,
        *,
        targets: Mapping[str, str] | None = None,
        layers: int | str | list[int | str] = -1,
        query: Literal["cls", "mean"] | int | tuple[int, int] = "cls",
        metrics: list[str] | str | MetricOptions | None = None,
        features: bool = False,
        evaluation: EvaluationOptions | str | os.PathLike[str] | tuple[Tensor, Tensor] | Dataset | None = None,  # type: ignore[type-arg]
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        drawing: DrawingOptions = DrawingOptions(),
        health: HealthLimits = HealthLimits(),
        forward: Forward | str | None = None,
        dirpath: str | os.PathLike[str] | Literal[False] | None = None,
        name: str | None = None,
        disk_reserve: int | None = None,
        heads: Heads = "pictures",
        keep_pictures: int | None = KEEP,
        on_error: OnError = "warn",
        num_images: int | None = None,
        image_size: int | tuple[int, ...] | None = None,
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
            evaluation=evaluation,
            drawing=drawing,
            health=health,
            forward=forward,
            heads=heads,
            keep_pictures=keep_pictures,
            on_error=on_error,
            disk_reserve=disk_reserve,
        )
        if self.options.probe.data is not None:
            raise ArgumentError(
                f"probe: received a {type(probe).__name__}, expected a folder, a tensor, a ProbeBatch, or None to take "
                "images of the trainer's own data"
            )
        self.targets, self.dirpath, self.name = check_targets(targets), check_dirpath(dirpath), check_name(name)
        chosen = any(given is not None for given in (probe, targets, forward, self.options.drawing.drawn_heads))
        self._strict = chosen or (layers, query) != (-1, "cls")
        self._images = LightningImages(self.options.probe.count)
        self.kept = Kept(self.options, Schedule(every_n_train_steps, every_n_epochs))
        self.run: Run | None = None  # from `setup` to `teardown`

    @property
    def monitor(self) -> AttentionMonitor | None:
        """Return the object that takes the snapshots; None until there are images."""
        return self.kept.monitor

    @property
    def active(self) -> bool:
        """Whether attention is watched in the present run."""
        return self.run is not None and self.run.active

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what can be checked before the model is on its device."""
        if stage != "fit":
            return
        self._drop_run()
        others = all_of(trainer)
        if self not in others:
            return
        self.run = Run(
            self.kept,
            lightning_run.rank_zero(trainer),
            warn=_warn,
            inform=_inform,
            name=lightning_run.name_in_tags([c.name for c in others], others.index(self)),
            strict=self._strict,
            roles_given=self.targets is not None,
            distributed=trainer.world_size > 1,
            checks_ema=next((c for c in others if c.options.health.check_ema), None) is self,  # only one reports
            budget=None if others[0].run is None else others[0].run.budget,  # one for all callbacks
        )
        if not lightning_run.configures_late(pl_module):
            self.run.errors.attempt("finding backbones", lambda: check_paths(pl_module, self.targets))
        if not trainer.loggers:
            _warn(reports.no_logger_text(self.dirpath is not False, self.dirpath or lightning_run.run_folder(trainer)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the model's attention, on images of the probe's size, now that it is on its device."""
        if self.run is not None and self.run.active:
            self.kept.set_enclosing(trainer.strategy.model)
            if self.monitor is not None or self.targets is not None:
                self.run.discover(self._find(trainer, pl_module))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Observe the images of the sanity check, as batches hold them and as the models receive them."""
        if trainer.sanity_checking and self.monitor is None and self.active:
            assert self.run is not None
            look = partial(self._images.look, batch, self._find(trainer, pl_module), pl_module)
            self.run.errors.attempt(lightning_run.SANITY_CHECK, look)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Keep these images, in case the validation data set cannot be read by index."""
        if trainer.sanity_checking and self.run is not None:
            self.run.errors.attempt(lightning_run.SANITY_CHECK, self._images.keep)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set up the schedule, as Lightning knows the run's length now, and open the archive."""
        if self.run is not None and self.run.active:
            lightning_run.open_output(trainer, self.run, self._images, self.dirpath, self.name)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take a snapshot if one is due. The last step is finished, updates of an EMA included."""
        if self.run is None:
            return
        step = lightning_run.steps_done(trainer)
        find, targets = partial(self._images.of_batch, batch, trainer), self._find(trainer, pl_module)
        if self.run.due(step) and self.run.probe.ensure(find, step, targets, batch):
            self._snapshot(trainer, pl_module, batch)
        else:
            self.run.between_steps(step)
        self.run.begin_batch(step, batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Sample weights before the module's own hook, which often updates the teacher."""
        if self.run is not None:
            self.run.record_loss(lightning_run.loss_of(trainer, outputs))
            self.run.batch_ended()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot by epoch, before checkpoints are saved, as these may monitor its metrics."""
        epoch, step = trainer.current_epoch, lightning_run.steps_done(trainer)
        if self.active and self.monitor is not None and self.kept.schedule.due_at_epoch_end(epoch, step):
            self._snapshot(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the last snapshot, and write everything."""
        if self.run is None or not self.run.active:
            return
        step = lightning_run.steps_done(trainer)
        if self.monitor is not None and self.kept.schedule.last_step != step:
            self._snapshot(trainer, pl_module, last=True)
        elif self.monitor is not None:
            self.run.confirm(self._find(trainer, pl_module), step=step)
        self.run.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what was captured for a few seconds, and report what is not written."""
        if self.run is not None:
            self.run.abort()
        self._drop_run()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the background threads, and release the model."""
        if stage == "fit":
            self._drop_run()

    @property
    def state_key(self) -> str:
        """Return a key that differs between callbacks with other targets, layers, queries or names."""
        given, named = self.options, {} if self.name is None else {"name": self.name}
        return self._generate_state_key(targets=self.targets, layers=given.layers, query=given.query, **named)

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state and the last step: a few megabytes at most, without pickled objects."""
        return self.kept.state_dict(Failures() if self.run is None else self.run.failures)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the same images after the last snapshot; start afresh if the state cannot be read."""
        if not state_dict:
            return
        try:
            text = self.kept.load_state_dict(state_dict)
        except Exception as error:  # another version's state may hold anything, and must not end a run
            text = "what the checkpoint holds of attention cannot be read, and film strips start afresh. "
            text += f"{type(error).__name__}: {error}"
        if text:
            _warn(text)

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
        """Take a snapshot, and let other callbacks monitor its metrics; those that come late are waited for then."""
        assert self.run is not None
        targets, step = self._find(trainer, pl_module), lightning_run.steps_done(trainer)
        wait = lightning_run.monitors_late_metrics(trainer, self.run.name)
        snapshot = self.run.snapshot(SnapshotRequest(targets, step, trainer.current_epoch, batch, last, wait))
        if snapshot is not None:
            means = snapshot.scalars(heads=False)
            if wait:
                means |= self.run.late_metrics(snapshot)
            trainer.callback_metrics.update({prefixed(t, self.run.name): torch.tensor(v) for t, v in means.items()})

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> FindTargets:
        assert self.run is not None
        images = None if self.monitor is None else self.monitor.probe.images
        return partial(lightning_run.find_targets, trainer, pl_module, self.targets, images, self.run.rank_zero)

    def _drop_run(self) -> None:
        """Drop the run, images and the model's methods, so that the callback can be copied between fits."""
        if self.run is not None:
            self.run.end()
        self.run = None
        self._images.forget()
        for name in ("log", "log_dict"):  # methods of the model, which Lightning gives to callbacks
            vars(self).pop(name, None)


def all_of(trainer: pl.Trainer) -> list[AttentionMapCallback]:
    """Return the callbacks of this kind that act in a trainer: those that yield do so if there are no others."""
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    found = [c for c in callbacks if isinstance(c, AttentionMapCallback)]
    return [c for c in found if not c.yields] or found


@rank_zero_only
def _warn(text: str) -> None:
    messages.warn(f"AttentionMapCallback: {text}")


def _inform(text: str) -> None:
    rank_zero_info(f"AttentionMapCallback: {text}")
