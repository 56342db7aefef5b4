"""`AttentionMapCallback`: when to look, what to look at, and what a resumed run needs. Lightning lives here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from attn_monitor import drawing, render, sinks
from attn_monitor.backbone import resolve_targets
from attn_monitor.capture import Layers, QuerySpec, check_query
from attn_monitor.errors import AttentionError
from attn_monitor.monitor import AttentionMonitor, check_threshold
from attn_monitor.probe import IMAGENET_MEAN, IMAGENET_STD, ProbeBatch, adopt_images
from attn_monitor.schedule import Schedule
from attn_monitor.snapshot import AttentionSnapshot, snapshot_path

MAX_FAILURES = 3
HISTORY = 24  # snapshots kept for film strips


class AttentionMapCallback(pl.Callback):
    """Logs what the CLS token attends to, on fixed probe images, while a vision transformer trains.

    Args:
        probe: the images: a folder, a tensor (images, channels, H, W) normalised as the model expects, or a
            `ProbeBatch`. None adopts the images of the sanity-check batch, else of the first training batch.
        targets: role to path of a backbone, such as ``{"student": "student.backbone"}``. None searches.
        layers: index in order of execution (negative from the end), module path, a list of these, or "all".
        query: "cls", "mean" (attention received, averaged over all queries), (row, col) of a patch, a token index.
        threshold: share of attention mass that DINO's mask keeps.
        every_n_train_steps, every_n_epochs: the schedule; with neither, about 50 snapshots over the run. There is
            always one before the first step and one after the last.
        num_images: how many images to take from a folder or a batch.
        image_size: size of images from a folder, one number or (height, width), in pixels.
        scale: colours in units of "uniform" attention (comparable between steps) or "minmax" (DINO's look).
        heads: heads to draw; None draws all.
        verify: check row·V against the model's output: True (first snapshot and after changes), "always", False.
        on_error: "warn" (one warning, training goes on) or "raise".

    Logged, with {role} student, teacher or backbone:
        - ``attn/{role}/layer{L}/{metric}``: entropy, mask_area, prefix_mass, peak, head_divergence, drift,
          student_teacher_divergence (means over heads and images), also in ``trainer.callback_metrics``
        - ``attn_heads/{role}/layer{L}/{metric}/head{h}``: the same for each head
        - ``attn_maps/{image}``: one panel; ``attn_filmstrip/{image}``: all steps so far in one picture
        - ``<log_dir>/attn_monitor/step-*.npz``: every snapshot, as `AttentionSnapshot`

    Raises:
        AttentionError, ProbeError, TargetError: before the first training step, with the argument, what was received,
            what was expected and what to do.
    """

    def __init__(
        self,
        probe: str | os.PathLike[str] | Tensor | ProbeBatch | None = None,
        *,
        targets: Mapping[str, str] | None = None,
        layers: int | str | list[int | str] = -1,
        query: str | int | tuple[int, int] = "cls",
        threshold: float = 0.6,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        num_images: int = 8,
        image_size: int | tuple[int, int] = 224,
        scale: str = "uniform",
        heads: list[int] | None = None,
        verify: bool | str = True,
        on_error: str = "warn",
    ) -> None:
        if on_error not in ("warn", "raise"):
            raise ValueError(f'on_error={on_error!r}: expected "warn" or "raise"')
        if num_images < 1:
            raise ValueError(f"num_images={num_images}: expected at least 1")
        self.probe, self.targets, self.num_images, self.image_size = probe, targets, num_images, image_size
        self.layers: Layers = layers
        self.query: QuerySpec = check_query(query)
        self.threshold, self.verify, self.on_error = check_threshold(threshold), verify, on_error
        self.schedule = Schedule(every_n_train_steps, every_n_epochs)
        self.style = drawing.Style(threshold, scale, None if heads is None else tuple(heads))
        self.monitor: AttentionMonitor | None = None
        self._history: list[AttentionSnapshot] = []
        self._models: dict[str, nn.Module] = {}
        self._failures = 0
        self._off = False

    # -- Lightning's hooks, in the order in which they are called ------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that can be checked before training."""
        if stage != "fit":
            return
        self._failures, self._off = 0, False
        self._blocked, self._taken, self._started = 0.0, 0, time.perf_counter()
        self._writer = sinks.BackgroundWriter()
        self._described = False
        if self.monitor is None and self.probe is not None:
            self._use_probe(self._load_probe(self.probe))
        if not _configures_late(pl_module):
            resolve_targets(pl_module, self.targets)
        if not trainer.loggers:
            rank_zero_warn(
                "AttentionMapCallback: this trainer has no logger, so attention is only written to the archive "
                f"({trainer.default_root_dir}/attn_monitor). Pass logger=TensorBoardLogger(...) to watch it"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is on its device now: find its attention, on images of the probe's size."""
        self._models = resolve_targets(pl_module, self.targets)
        log_dir = trainer.log_dir or trainer.default_root_dir
        self._folder = None if getattr(trainer, "fast_dev_run", False) else Path(log_dir) / "attn_monitor"
        if self.monitor is not None:
            with trainer.precision_plugin.forward_context():
                self.monitor.check(self._models)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adopt the images of the sanity check as the probe, where none was given."""
        if trainer.sanity_checking and self.monitor is None:
            self._use_probe(adopt_images(batch, self.num_images))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay out the schedule, now that Lightning knows how long the run is."""
        self.schedule.start(trainer.estimated_stepping_batches)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: the last one is finished, averages of weights included, and the next has not begun."""
        if self.monitor is None:
            self._use_probe(adopt_images(batch, self.num_images))
        if self.schedule.due(trainer.global_step):
            self._snapshot(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Snapshots by epoch are taken before checkpoints are saved, so that these can monitor them."""
        if self.schedule.due_at_epoch_end(trainer.current_epoch, trainer.global_step):
            self._snapshot(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last snapshot, and everything written."""
        if self.monitor is not None and self.schedule.last_step != trainer.global_step:
            self._snapshot(trainer)
        self._writer.drain()
        self._report_errors()
        self._report_cost()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what was captured before the failure."""
        if hasattr(self, "_writer"):
            self._writer.drain()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the background thread and let go of the models."""
        if stage == "fit" and hasattr(self, "_writer"):
            self._writer.close()
            self._models = {}

    # -- state for resuming -------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Distinct for callbacks that look at different things, so that several can be used at once."""
        return self._generate_state_key(targets=self.targets, layers=self.layers, query=self.query)

    def state_dict(self) -> dict[str, Any]:
        """Probe, last step and film-strip history: a few megabytes at most, without pickled objects."""
        if self.monitor is None:
            return {}
        previous = self.monitor.previous
        return {
            "probe": self.monitor.probe.state_dict(),
            "last_step": self.schedule.last_step,
            "previous": None if previous is None else previous.state_dict(),
            "history": [s.state_dict() for s in self._history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same images from the step after the last snapshot."""
        if not state_dict:
            return
        self._use_probe(ProbeBatch.from_state_dict(state_dict["probe"]))
        self.schedule.last_step = state_dict["last_step"]
        self._history = [AttentionSnapshot.from_state_dict(s) for s in state_dict["history"]]
        if self.monitor is not None and state_dict["previous"] is not None:
            self.monitor.previous = AttentionSnapshot.from_state_dict(state_dict["previous"])

    # -- one snapshot -------------------------------------------------------------------------------------------

    def _load_probe(self, probe: str | os.PathLike[str] | Tensor | ProbeBatch) -> ProbeBatch:
        if isinstance(probe, ProbeBatch):
            return probe
        if isinstance(probe, Tensor):
            channels = probe.shape[1] if probe.ndim == 4 else 3
            mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
            return ProbeBatch(probe, mean=mean, std=std)
        return ProbeBatch.from_folder(probe, size=self.image_size, num_images=self.num_images)

    def _use_probe(self, probe: ProbeBatch) -> None:
        self.monitor = AttentionMonitor(
            probe, layers=self.layers, query=self.query, threshold=self.threshold, verify=self.verify
        )

    def _snapshot(self, trainer: pl.Trainer) -> None:
        if self._off:
            return
        started, step, first = time.perf_counter(), trainer.global_step, self._taken == 0
        self.schedule.taken(step)
        self._report_errors()
        try:
            self._take(trainer, step)
            self._failures = 0
        except Exception as error:
            # Nothing has been trained yet: a model that cannot be watched is a mistake to mend now.
            if self.on_error == "raise" or (first and isinstance(error, AttentionError)):
                raise
            self._failed(f"the snapshot at step {step} was skipped", error)
        self._blocked += time.perf_counter() - started

    def _take(self, trainer: pl.Trainer, step: int) -> None:
        assert self.monitor is not None
        with trainer.precision_plugin.forward_context():
            snapshot = self.monitor.snapshot(self._models, step=step, epoch=trainer.current_epoch)
        self._taken += 1
        trainer.callback_metrics.update(
            {k: torch.tensor(v) for k, v in snapshot.metrics.items() if k.startswith("attn/")}
        )
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            sinks.log_scalars(logger, metrics=snapshot.metrics, step=step)
        self._remember(snapshot)
        job = partial(self._publish, snapshot, list(self._history), list(trainer.loggers))
        if not self._writer.submit(job):
            rank_zero_warn(f"AttentionMapCallback: writing is too slow; the pictures of step {step} were skipped")

    def _remember(self, snapshot: AttentionSnapshot) -> None:
        self._history.append(snapshot.only(self._shown_layers(snapshot)))
        if len(self._history) > HISTORY:
            kept = drawing.thin([s.step for s in self._history], HISTORY * 3 // 4)
            self._history = [self._history[i] for i in kept]

    def _shown_layers(self, snapshot: AttentionSnapshot) -> Sequence[int]:
        """Layers to draw: each one of a list, else the last."""
        captured = snapshot.layers_of(snapshot.roles[-1])
        return captured if isinstance(self.layers, (list, tuple)) else captured[-1:]

    # -- behind the training thread -----------------------------------------------------------------------------

    def _publish(self, snapshot: AttentionSnapshot, history: list[AttentionSnapshot], loggers: list[Any]) -> None:
        """Archive, then draw, then log; each part for itself, so that one that fails does not keep the others back."""
        assert self.monitor is not None
        parts: list[partial[Any]] = []
        if self._folder is not None:
            parts.append(partial(self._archive, self._folder, snapshot))
        if not self._described:
            text, layers = how_to_read(self.threshold, self.style.scale), list(snapshot.layers)
            parts += [partial(sinks.describe_run, logger, text=text, layers=layers) for logger in loggers]
            self._described = True
        takers = [logger for logger in loggers if sinks.takes_pictures(logger)]
        if takers:
            pictures = self._draw(snapshot, history)
            parts += [partial(sinks.log_pictures, t, pictures=pictures, step=snapshot.step) for t in takers]
        for part in parts:
            try:
                part()
            except Exception as error:
                self._writer.errors.put(error)

    def _archive(self, folder: Path, snapshot: AttentionSnapshot) -> None:
        assert self.monitor is not None
        if not (folder / "probe.npz").exists():
            self.monitor.probe.save(folder / "probe.npz")
        snapshot.save(snapshot_path(folder, snapshot.step))

    def _draw(self, snapshot: AttentionSnapshot, history: list[AttentionSnapshot]) -> list[sinks.Picture]:
        assert self.monitor is not None
        pixels, masks = self.monitor.probe.pixels, self.monitor.probe.masks
        layers = self._shown_layers(snapshot)
        pictures = []
        for index, name in enumerate(snapshot.names):
            truth = None if masks is None else masks[index].numpy()
            for layer in layers:
                suffix = f"/layer{layer}" if len(layers) > 1 else ""
                caption = f"{name}, step {snapshot.step}"
                shown = render.panel(snapshot, index, pixels[index], layer=layer, truth=truth, style=self.style)
                strip = render.filmstrip(history, index, pixels[index], layer=layer, style=self.style)
                pictures.append(sinks.Picture(f"attn_maps/{name}{suffix}", shown, caption))
                pictures.append(sinks.Picture(f"attn_filmstrip/{name}{suffix}", strip, caption))
        return pictures

    # -- failures and the final line ----------------------------------------------------------------------------

    def _report_errors(self) -> None:
        while not self._writer.errors.empty():
            error = self._writer.errors.get()
            if self.on_error == "raise":
                raise error
            self._failed("something could not be written", error)

    def _failed(self, what: str, error: BaseException) -> None:
        self._failures += 1
        if self._failures == 1:
            rank_zero_warn(
                f"AttentionMapCallback: {what}, training goes on. {type(error).__name__}: {error} "
                '(on_error="raise" shows the traceback)'
            )
        elif self._failures == MAX_FAILURES:
            self._off = True
            rank_zero_warn(
                f"AttentionMapCallback: switched off after {MAX_FAILURES} failures in a row, the last one "
                f'{type(error).__name__}: {error}. Use on_error="raise" to see the traceback'
            )

    def _report_cost(self) -> None:
        wall = time.perf_counter() - self._started
        rank_zero_info(
            f"AttentionMapCallback: {self._taken} snapshots, {self._blocked:.1f} s on the training thread "
            f"({self._blocked / max(wall, 1e-9):.1%} of {wall:.0f} s), {self._writer.seconds:.1f} s behind it"
            + (f"; archive in {self._folder}" if self._folder is not None else "")
        )


def _configures_late(pl_module: pl.LightningModule) -> bool:
    """Whether the module builds itself in `configure_model`, which Lightning calls after `setup`."""
    return type(pl_module).configure_model is not pl.LightningModule.configure_model


def how_to_read(threshold: float, scale: str) -> str:
    """Markdown for the dashboard: what the pictures show, with this run's settings."""
    colours = (
        "Colours are fixed: attention in units of **uniform** attention (weight × number of patches), on a log scale "
        "from half of uniform to 32 times uniform. A flat purple map says that attention is uniform."
        if scale == "uniform"
        else "Colours stretch each map from its own minimum to its own maximum, so strengths cannot be compared."
    )
    return (
        f"### How to read the attention maps\n\n{colours} Outlined in cyan: the smallest set of patches that holds "
        f"{threshold:.0%} of the attention on patches. **H** is the entropy over patches (1 uniform, 0 one patch); "
        "the percentage is the outlined area. `attn_filmstrip` shows the steps so far in one picture; start "
        "TensorBoard with `--samples_per_plugin images=1000` to see more than ten steps of `attn_maps`. Charts of all "
        "heads of a layer are under *Custom Scalars*."
    )
