"""`AttentionMapCallback`: when to look, what to look at, and what a resumed run needs. Lightning lives here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor, nn

from attn_monitor import distributed
from attn_monitor.capture.backbones import find_backbones, resolve_targets
from attn_monitor.capture.forward import Forward
from attn_monitor.capture.forward_choice import FORWARD_OPTIONS, ForwardOption
from attn_monitor.capture.recorder import Verify, check_verify
from attn_monitor.capture.selection import Layers, QuerySpec, check_layers, check_query
from attn_monitor.capture.sharding import forward_within
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import AttentionError, ProbeError, TargetError
from attn_monitor.measure.health import HealthLimits
from attn_monitor.measure.metrics import select_metrics
from attn_monitor.monitor import AttentionMonitor, check_threshold
from attn_monitor.publish.background import LAST_WORDS, Patience
from attn_monitor.publish.disk_space import check_reserve
from attn_monitor.publish.failures import Failures
from attn_monitor.publish.other_loggers import CSVSink
from attn_monitor.publish.publisher import Publisher
from attn_monitor.publish.sink import TakesPictures
from attn_monitor.publish.sinks import sink_for
from attn_monitor.publish.tags import check_name, renamed
from attn_monitor.record.archive import set_aside, written_between
from attn_monitor.record.claim import Claim, claim_again, claim_free
from attn_monitor.record.normalisation import declared_statistics
from attn_monitor.record.npz import remove_unfinished
from attn_monitor.record.probe import ProbeBatch
from attn_monitor.record.snapshot import AttentionSnapshot
from attn_monitor.train import lightning_run as run
from attn_monitor.train import reports as telling
from attn_monitor.train.arguments import (
    OnError,
    Probe,
    check_dirpath,
    check_heads,
    check_on_error,
    check_probe,
    check_statistics,
    import_forward,
)
from attn_monitor.train.batch_images import find_images
from attn_monitor.train.probe_search import (
    TRAINING_CAPTION,
    VALIDATION_CAPTION,
    probe_from_batch,
    probe_from_images,
    probe_from_loaders,
)
from attn_monitor.train.schedule import Schedule

Result = TypeVar("Result")

TAKING = "taking a snapshot"
MENDABLE: tuple[type[Exception], ...] = (
    AttentionError,
    ProbeError,
    TargetError,
)  # by the user, in what the callback was given
STATE_VERSION = 1


class AttentionMapCallback(pl.Callback):
    """Logs what the CLS token attends to, on fixed probe images, while a vision transformer trains.

    Args:
        probe: the images: a folder, a tensor (images, channels, H, W) normalised as the model expects, or a
            `ProbeBatch`. None takes evenly spaced images of the validation data set, else of the training data.
        targets: role to path of a backbone, such as ``{"student": "student.backbone"}``. None searches.
        layers: index in order of execution (negative from the end), module path, a list of these, or "all".
        query: "cls", "mean" (attention received, averaged over all queries), (row, col) of a patch, a token index. A
            model without a CLS token is looked at by "mean".
        threshold: share of attention mass that DINO's mask keeps.
        metrics: names of metrics to log; None is all but "distance", which needs every query's row; "all" is all.
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
        verify: Verify = True,
        forward: Forward | str | None = None,
        dirpath: str | os.PathLike[str] | Literal[False] | None = None,
        name: str | None = None,
        disk_reserve: int | None = None,
        on_error: OnError = "warn",
    ) -> None:
        self.num_images, self.image_size = check_probe(probe, num_images, image_size, masks)
        self.probe, self.targets, self.masks = probe, targets, masks
        self.statistics = check_statistics(probe, mean, std)
        self.forward, self.dirpath = import_forward(forward), check_dirpath(dirpath)
        self.layers: Layers = check_layers(layers)
        self.query: QuerySpec = check_query(query)
        self.threshold, self.verify = check_threshold(threshold), check_verify(verify)
        self.on_error = check_on_error(on_error)
        self.metrics, self.health = select_metrics(metrics), health
        self.schedule = Schedule(every_n_train_steps, every_n_epochs)
        self._ways = FORWARD_OPTIONS if self.forward is None else (ForwardOption(self.forward),)
        self.style = DrawingOptions(threshold, scale, check_heads(heads))
        self.name, self.disk_reserve = check_name(name), check_reserve(disk_reserve)
        self.monitor: AttentionMonitor | None = None
        self._publisher: Publisher | None = None
        self._open_publisher: Callable[..., Publisher] | None = None
        self._folder: Path | None = None
        self._archive: str | None = None
        self._run: str | None = None  # what the archive's claim calls this run
        self._claim: Claim | None = None
        self._run_folder: Path | None = None
        self._root: nn.Module | None = None
        self._stepped_aside = False
        self._checked: Tensor | None = None  # images of the sanity check
        self._shared = False  # whether several processes train together

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that can be checked before training."""
        if stage != "fit":
            return
        self._failures, self._begun = Failures('it is tried again; on_error="raise" shows the traceback'), False
        self._patience = Patience()
        self._resumed = False
        self._suffix = self._choose_suffix(trainer)
        self._looked, self._blocked, self._taken, self._started = 0.0, 0.0, 0, time.perf_counter()
        self._shared = trainer.world_size > 1
        if self.monitor is not None:
            self.monitor.distributed = self._shared
        self._stepped_aside, self._checked = False, None
        if self.monitor is None and self.probe is not None:
            self._use_probe(self._from_first(trainer, self._load_probe))
        if not _configures_late(pl_module):
            self._attempt("finding backbones", lambda: resolve_targets(pl_module, self.targets))
        if not trainer.loggers:
            where = f"only written to the archive and as pictures, in {self.dirpath or trainer.default_root_dir}"
            _warn(
                "AttentionMapCallback: this trainer has no logger, so attention is "
                f"{'written nowhere, with dirpath=False' if self.dirpath is False else where}. "
                "Pass logger=TensorBoardLogger(...) to watch it"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is on its device now: find its attention, on images of the probe's size."""
        started, self._root = time.perf_counter(), trainer.strategy.model

        def look() -> None:
            models = resolve_targets(pl_module, self.targets)
            if self.monitor is not None:
                with trainer.precision_plugin.forward_context():
                    self.monitor.check(models)
                self._learn(self.monitor)

        self._attempt(TAKING, look)
        self._report_failures()
        self._looked += time.perf_counter() - started

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the images of the sanity check, for a validation data set that cannot be asked for others."""
        lacking = self.num_images - (0 if self._checked is None else len(self._checked))
        if not trainer.sanity_checking or self.monitor is not None or lacking <= 0:
            return
        images = find_images(batch)
        if images is None:
            return
        images = images[:lacking].detach().cpu()
        if self._checked is None or self._checked.shape[1:] == images.shape[1:]:
            self._checked = images if self._checked is None else torch.cat([self._checked, images])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay out the schedule, now that Lightning knows how long the run is, and open what is written to."""
        if self._stepped_aside:
            return
        self.schedule.start(run.total_steps(trainer))
        run_folder = self._try("finding the run's folder", lambda: run.run_folder(trainer))
        run_folder = Path(trainer.default_root_dir) if run_folder is None else run_folder
        if not self._from_first(trainer, lambda: self._goes_on(run.steps_done(trainer), run_folder)):
            self._start_afresh()
        self._run_folder = run_folder
        started = time.perf_counter()
        self._find_probe(trainer, pl_module)
        self._looked += time.perf_counter() - started
        folder = None
        if self.dirpath is not False and not getattr(trainer, "fast_dev_run", False):
            choose = partial(self._choose_archive, trainer, run_folder)
            folder = self._try("opening the archive", lambda: self._from_first(trainer, choose))
        if trainer.is_global_zero:
            self._open_publisher = partial(
                Publisher,
                trainer.loggers,
                folder=folder,
                style=self.style,
                failures=self._failures,
                settings=self._settings(),
                name=self._suffix,
                disk_reserve=self.disk_reserve,
                patience=all_of(trainer)[0]._patience,  # a minute for all of them together
            )
            self._folder = folder
            self._tell_what_is_skipped(trainer.loggers)
        for snapshot in self._from_first(trainer, lambda: self._missed(run.steps_done(trainer))):
            assert self.monitor is not None
            self.monitor.remember(snapshot)
            self.schedule.taken(snapshot.step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: the last one is finished, averages of weights included, and the next has not begun."""
        step = run.steps_done(trainer)
        if not self._stepped_aside and self.schedule.due(step):
            adopt = partial(self._adopt, trainer, batch)
            if self.monitor is not None or self._attempt("taking images of a batch", adopt):
                self._snapshot(trainer, pl_module)
            else:
                self.schedule.taken(step)  # the next try is where the next snapshot is due
                self._report_failures()
        self._begun = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Snapshots by epoch are taken before checkpoints are saved, so that these can monitor them."""
        if not self._stepped_aside and self.schedule.due_at_epoch_end(trainer.current_epoch, run.steps_done(trainer)):
            self._snapshot(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last snapshot, and everything written."""
        if self._stepped_aside:
            return
        if self.monitor is not None and self.schedule.last_step != run.steps_done(trainer):
            self._snapshot(trainer, pl_module)
        if self._publisher is not None:
            ended = time.perf_counter()
            self._publisher.close()
            self._report_cost(self._publisher, time.perf_counter() - ended)
        self._report_failures()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what was captured before the failure, for a few seconds, and say what is not written."""
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            all_of(trainer)[0]._patience.limit(LAST_WORDS)
            publisher.close(finish=False)
            self._report_failures(reraise=False)  # the exception that there is comes first
            if publisher.folder is not None and publisher.archived is not None:
                rank_zero_info(
                    f"AttentionMapCallback: the archive in {publisher.folder} ends with step {publisher.archived}"
                )
        self._let_go()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the background threads, and let go of the model."""
        if stage == "fit":
            if self._publisher is not None:
                self._publisher.close(finish=False)
            self._let_go()

    def _let_go(self) -> None:
        """Between fits there are settings and state alone: no model, no thread, nothing that cannot be copied."""
        self._release()
        self._publisher = self._open_publisher = self._folder = self._root = self._checked = None
        for name in ("_failures", "log", "log_dict"):  # Lightning gives callbacks the last two, methods of the model
            vars(self).pop(name, None)
        if self.monitor is not None:
            self.monitor.let_go()

    @property
    def state_key(self) -> str:
        """Distinct for callbacks that look at different things, so that several can be used at once."""
        named = {} if self.name is None else {"name": self.name}
        return self._generate_state_key(targets=self.targets, layers=self.layers, query=self.query, **named)

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state and the last step: a few megabytes at most, without pickled objects."""
        if self.monitor is None:
            return {}
        return {
            "version": STATE_VERSION,
            "monitor": self.monitor.state_dict(),
            "last_step": self.schedule.last_step,
            "archive": self._archive,
            "run": self._run,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same images from the step after the last snapshot; start afresh if it cannot be read."""
        if not state_dict:
            return
        given = None if self.monitor is None else self.monitor.probe
        try:
            self._read_state(state_dict)
        except Exception as error:  # another version's may hold anything, and must not end a run
            _warn(
                "AttentionMapCallback: what the checkpoint holds of attention cannot be read, and film strips start "
                f"afresh. {type(error).__name__}: {error}"
            )
            return
        assert self.monitor is not None
        if given is not None and not given.has_same_images_as(self.monitor.probe):
            names = ", ".join(self.monitor.probe.names)
            _warn(
                f"AttentionMapCallback: the probe images of the checkpoint are shown ({names}) and not those of the "
                "probe argument, so that maps can be compared over the whole run"
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so when the checkpoint comes from a callback with other arguments, whose state cannot be used."""
        others = [key for key in checkpoint.get("callbacks", {}) if key.startswith(type(self).__qualname__)]
        if others and self.state_key not in others:
            _warn(
                f"AttentionMapCallback: the checkpoint was made with {', '.join(others)}, and this callback is "
                f"{self.state_key}. It starts afresh: new probe images, and film strips from here on"
            )

    def _read_state(self, state: dict[str, Any]) -> None:
        """Take over a state, or raise why not and leave all as it is."""
        version = state.get("version", 1)  # the first had no number
        if not isinstance(version, int) or version > STATE_VERSION:
            raise ValueError(f"its version is {version!r}, expected up to {STATE_VERSION}")
        monitor = self._make_monitor(ProbeBatch.from_state_dict(state["monitor"]["probe"]))
        monitor.load_state_dict(state["monitor"])
        last_step, archive = state["last_step"], state["archive"]
        if not isinstance(last_step, (int, type(None))) or not isinstance(archive, (str, type(None))):
            raise ValueError(f"last_step={last_step!r}, archive={archive!r}: expected a number and a folder's name")
        self.monitor, self.schedule.last_step, self._archive, self._resumed = monitor, last_step, archive, True
        self._run = state.get("run")  # the first stage had none

    def _load_probe(self) -> ProbeBatch:
        assert self.probe is not None
        mean, std = self.statistics or (None, None)
        size, count = self.image_size, self.num_images
        return ProbeBatch.of(self.probe, size=size, num_images=count, masks=self.masks, mean=mean, std=std)

    def _adopt(self, trainer: pl.Trainer, batch: Any) -> None:
        adopt = partial(probe_from_batch, batch, self.num_images, caption=TRAINING_CAPTION)
        probe = self._from_first(trainer, lambda: adopt(declared=declared_statistics(trainer.train_dataloader)))
        self._use_probe(probe.with_statistics(*self.statistics) if self.statistics else probe)

    def _use_probe(self, probe: ProbeBatch) -> None:
        self.monitor = self._make_monitor(probe)

    def _make_monitor(self, probe: ProbeBatch) -> AttentionMonitor:
        return AttentionMonitor(
            probe,
            layers=self.layers,
            query=self.query,
            threshold=self.threshold,
            metrics=self.metrics,
            health=self.health,
            verify=self.verify,
            forward=[replace(way, forward=partial(self._call, way.forward)) for way in self._ways],
            or_mean=True,
            distributed=self._shared,
        )

    def _call(self, forward: Forward, model: nn.Module, images: Tensor) -> Any:
        """The model called so, through the FSDP units around it where there are some."""
        return forward_within(model if self._root is None else self._root, forward)(model, images)

    def _attempt(self, part: str, look: Callable[[], object]) -> bool:
        """Do it; whether it was done. Want of memory or a mistake of ours is one warning, and tried again.

        Before the first step, what the user can mend ends the run if it is of what they have asked for; else the run
        goes on without maps.
        """
        try:
            return self._failures.attempt(part, look, let=() if self._begun else MENDABLE)
        except MENDABLE as error:
            given = (self.probe, self.targets, self.forward, self.style.heads)
            asked = any(g is not None for g in given) or (self.layers, self.query) != (-1, "cls")
            if asked or self.on_error == "raise":
                raise
            self._step_aside(error)
            return False

    def _try(self, part: str, action: Callable[[], Result]) -> Result | None:
        """What it gives, None where it fails."""
        found: list[Result] = []
        self._failures.attempt(part, lambda: found.append(action()))
        return found[0] if found else None

    def _learn(self, monitor: AttentionMonitor) -> None:
        """What the first look at the model tells: heads that it has not are a mistake, layers left out are said."""
        monitor.check_heads(self.style.heads)
        for text in monitor.left_out():
            self._failures.note(text)

    def _step_aside(self, error: Exception) -> None:
        if not self._stepped_aside:
            _warn(f"AttentionMapCallback: attention is not watched in this run. {str(error).rstrip('.')}")
        self._stepped_aside = True

    def _from_first(self, trainer: pl.Trainer, action: Callable[[], Result]) -> Result:
        return distributed.from_first(trainer.strategy.broadcast, trainer.global_rank, action)

    def _find_probe(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where none was given: validation images, else those of the sanity check, else of the training data set.

        Process 0 chooses. Where all of these fail, the images of the first training batch are taken.
        """
        if self.monitor is not None:
            return
        probe = self._from_first(trainer, lambda: self._images_of_data(trainer, pl_module))
        self._checked = None
        if probe is not None:
            self._use_probe(probe.with_statistics(*self.statistics) if self.statistics else probe)

    def _images_of_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ProbeBatch | None:
        validation, training = trainer.val_dataloaders, trainer.train_dataloader
        # Images are changed on the way to the model: those of the data set are not what it sees.
        as_is = not run.changes_batches(trainer)

        def ask(loaders: Any, caption: str) -> ProbeBatch | None:
            found: list[ProbeBatch | None] = []
            adopt = partial(probe_from_loaders, loaders, self.num_images, pl_module, caption=caption)
            self._failures.attempt(f"finding a {caption}", lambda: found.append(adopt()))
            return found[0] if found else None

        probe = ask(validation, VALIDATION_CAPTION) if as_is else None
        if probe is None and self._checked is not None:
            probe = probe_from_images(
                self._checked, caption=VALIDATION_CAPTION, declared=declared_statistics([validation, training])
            )
        return ask(training, TRAINING_CAPTION) if probe is None and as_is else probe

    def _goes_on(self, step: int, run_folder: Path) -> bool:
        """Whether this fit continues what the callback has seen: resumed, or the same run trained further."""
        ahead = self.schedule.last_step is not None and self.schedule.last_step > step
        return not ahead and (self._resumed or (step > 0 and run_folder == self._run_folder))

    def _start_afresh(self) -> None:
        """Another fit with the same callback, and not one that goes on."""
        self.schedule.last_step = self._archive = self._run = None
        if self.monitor is not None:
            self.monitor.forget()

    def _choose_suffix(self, trainer: pl.Trainer) -> str:
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

    def _choose_archive(self, trainer: pl.Trainer, run_folder: Path) -> Path:
        """The folder that a resumed run wrote to, else one that no other run or callback writes to."""
        place, base = run_folder, renamed("attn_monitor", self.name or "")
        if self.dirpath:
            place, base = self.dirpath.parent, self.dirpath.name
        self._release()
        before = None if self._archive is None else place / self._archive
        claim = None if before is None else claim_again(before, self._run)
        if claim is None:
            first = 1 if self.name is not None else int(self._suffix or 1)  # the same number as in its tags
            claim = claim_free(place, base, first)
        else:
            self._tidy(claim.folder, run.steps_done(trainer))
        if claim.note:
            rank_zero_info(f"AttentionMapCallback: {claim.note}")
        self._claim, self._archive, self._run = claim, claim.folder.name, claim.run
        return claim.folder

    def _tidy(self, folder: Path, step: int) -> None:
        """What a process of this run left behind when it was killed."""

        def tidy() -> None:
            remove_unfinished(folder)
            if told := set_aside(folder, step):
                _warn(f"AttentionMapCallback: {told}")

        self._failures.attempt("tidying the archive", tidy)

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _missed(self, step: int) -> list[AttentionSnapshot]:
        """Resuming in the same folder: what was taken between the checkpoint and now need not be taken again."""
        folder = self._folder
        if folder is None or self.monitor is None or self.schedule.last_step is None:
            return []
        names = self.monitor.probe.names
        return written_between(folder, self.schedule.last_step, step, names, self._failures.note)

    def _snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        started, step = time.perf_counter(), run.steps_done(trainer)
        self._report_failures()
        # All processes must agree on it, and their clocks differ.
        now = self._from_first(trainer, lambda: not self._failures.pause(TAKING))
        taken = now and self._attempt(TAKING, partial(self._take, trainer, pl_module, step))
        if not taken and not self._stepped_aside:
            self._failures.lost(TAKING, step)
        self.schedule.taken(step)  # not where Ctrl-C came between: then it is taken when the run is resumed
        self._report_failures()
        self._blocked += time.perf_counter() - started

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        assert self.monitor is not None
        models = resolve_targets(pl_module, self.targets)  # each time: modules may have been replaced
        with trainer.precision_plugin.forward_context():
            if not self._taken:
                self._look(lambda monitor: monitor.check(models))
                self._learn(self.monitor)
            if self._publisher is None and self._open_publisher is not None:
                every, history = self.monitor.draws_every_layer, self.monitor.history
                self._publisher = self._open_publisher(self.monitor.probe, every_layer=every, history=history)
            started = time.perf_counter()
            snapshot = self.monitor.snapshot(models, step=step, epoch=trainer.current_epoch)
        self._taken += 1
        if self._taken == 1:
            self._tell_what_was_found(trainer, pl_module, time.perf_counter() - started)
        means = {renamed(tag, self._suffix): torch.tensor(v) for tag, v in snapshot.scalars(heads=False).items()}
        trainer.callback_metrics.update(means)
        if self._publisher is not None:
            self._publisher.publish(snapshot)

    def _look(self, action: Callable[[AttentionMonitor], object]) -> None:
        """What happens once a run, whose time is told apart from that of snapshots."""
        started = time.perf_counter()
        assert self.monitor is not None
        action(self.monitor)
        self._looked += time.perf_counter() - started
        self._blocked -= time.perf_counter() - started

    def _tell_what_was_found(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float) -> None:
        if self._publisher is None or self.monitor is None:
            return
        text = telling.found_text(
            self.monitor.found(),
            self.targets or find_backbones(pl_module),
            self.monitor.probe,
            schedule=str(self.schedule),
            seconds=seconds,
            count=self.schedule.count(run.total_steps(trainer)),
            folder=self._publisher.folder,
        )
        rank_zero_info(f"AttentionMapCallback: {text}")
        self._publisher.settings = f"{text}\n\n{self._publisher.settings}"

    def _settings(self) -> str:
        """Markdown that records how this run is watched."""
        settings = {
            "targets": self.targets or "found",
            "layers": self.layers,
            "query": self.query,
            "threshold": self.threshold,
            "metrics": ", ".join(self.metrics),
            "health": self.health,
            "every_n_train_steps": self.schedule.every_n_train_steps,
            "every_n_epochs": self.schedule.every_n_epochs,
            "verify": self.verify,
        }
        return telling.settings_text([*settings.items()])

    def _tell_what_is_skipped(self, loggers: list[Any]) -> None:
        """One line for loggers without any way to take pictures; CSV is known to be for numbers only."""
        without = [sink for sink in map(sink_for, loggers) if not isinstance(sink, (TakesPictures, CSVSink))]
        names = [type(sink.logger).__name__ for sink in without]
        if names:
            rank_zero_info(f"AttentionMapCallback: {', '.join(names)} get metrics only, as they have no log_image")

    def _report_failures(self, *, reraise: bool = True) -> None:
        self._failures.report(
            lambda text: _warn(f"AttentionMapCallback: {text}"), reraise=reraise and self.on_error == "raise"
        )

    def _report_cost(self, publisher: Publisher, waited: float) -> None:
        wall = time.perf_counter() - self._started
        text = telling.cost_text(self._taken, self._looked, self._blocked, wall, waited, publisher.seconds)
        where = f"; archive in {publisher.folder}" if publisher.folder is not None else ""
        rank_zero_info(f"AttentionMapCallback: {text}{where}")
        flags = self.monitor.health.flags if self.monitor is not None else []
        rank_zero_info(
            f"AttentionMapCallback: {len(flags) or 'no'} health flag{'' if len(flags) == 1 else 's'} raised"
            + "".join(f"\n  {flag}" for flag in flags)
        )


@rank_zero_only
def _warn(text: str) -> None:
    telling.warn(text)


def all_of(trainer: pl.Trainer) -> list[AttentionMapCallback]:
    """Every callback of this kind that a trainer has."""
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    return [c for c in callbacks if isinstance(c, AttentionMapCallback)]


def _configures_late(pl_module: pl.LightningModule) -> bool:
    """Whether the module builds itself in `configure_model`, which Lightning calls after `setup`."""
    return type(pl_module).configure_model is not pl.LightningModule.configure_model
