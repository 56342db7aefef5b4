"""`AttentionMapTrainerCallback` for the Hugging Face `Trainer`. The only module here that needs transformers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from attn_monitor.extras import needs
from attn_monitor.messages import warn
from attn_monitor.probe.options import ProbeOptions, is_data
from attn_monitor.record.atomic_file import atomic_file
from attn_monitor.watch import Watch

with needs("transformers", "AttentionMapTrainerCallback"):
    from transformers import TrainerCallback

STATE = "attn_monitor.pt"  # in each checkpoint
CURRENT_RUN: Mapping[str, Callable[[Any], Any]] = {
    "wandb": lambda wandb: wandb.run,
    "comet_ml": lambda comet_ml: comet_ml.get_running_experiment(),
    "clearml": lambda clearml: clearml.Task.current_task(),
    "swanlab": lambda swanlab: swanlab.get_run(),
    "trackio": lambda trackio: trackio.context_vars.current_run.get(),
}  # by name in ``report_to``: the run that transformers has opened


class AttentionMapTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Log what the CLS token attends to while a Hugging Face `Trainer` trains.

    Example::

        Trainer(..., callbacks=[AttentionMapTrainerCallback()]).train()

    Pictures and metrics go to TensorBoard, beside the Trainer's own curves, and to the current run of W&B, Comet,
    ClearML, SwanLab and Trackio, as selected by ``report_to``; the archive goes to ``{output_dir}/attn_monitor``.
    Checkpoints hold the state of a resumed run.

    Args:
        probe: Probe as in `Watch`, or a data set, whose samples the Trainer's collator combines. None takes evenly
            spaced images of the training data.
        loggers: Loggers to use instead of those of ``report_to``.
        every_n_train_steps: Steps between snapshots; None takes 50 snapshots over the run.
        settings: Other arguments of `Watch`.
    """

    def __init__(
        self,
        probe: Any = None,
        *,
        loggers: Sequence[Any] | None = None,
        every_n_train_steps: int | None = None,
        **settings: Any,
    ) -> None:
        self.probe, self.loggers = probe, loggers
        self.settings = {**settings, "every_n_train_steps": every_n_train_steps}
        self.watch: Watch | None = None
        self._missed = False  # whether a checkpoint's folder was not where it is expected
        self._opened: list[Any] = []  # loggers made here, closed at the end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the first snapshot; the model is on its device now."""
        self._stop(Watch.abort)  # if the last training ended by an exception, which callbacks are not informed of
        if not state.is_world_process_zero:
            return
        loader = kwargs.get("train_dataloader")
        self.watch = Watch(
            kwargs["model"],
            loader if self.probe is None else _in_batches(self.probe, loader),
            loggers=self._loggers_of(args) if self.loggers is None else self.loggers,
            folder=args.output_dir,
            total_steps=state.max_steps,
            **self.settings,
        )
        self._resume(args, state)
        self._look(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a snapshot if one is due."""
        self._look(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state into the checkpoint that was just saved."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if self.watch is None:
            return
        if folder.is_dir():
            try:
                with atomic_file(folder / STATE) as file:
                    torch.save(self.watch.state_dict(), file)
            except Exception as error:  # on a full disk PyTorch raises RuntimeError
                warn(f"attn_monitor: {folder / STATE} cannot be written ({error}). A run resumed from it starts afresh")
        elif not self._missed:  # in a search of hyperparameters, checkpoints are in a folder of each trial
            self._missed = True
            warn(
                f"attn_monitor: {folder} does not exist, so the checkpoint holds no state of attn_monitor. A run "
                "resumed from it starts afresh"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the last snapshot and close the loggers."""
        self._stop(lambda watch: watch.close(state.global_step))

    def _stop(self, stop: Callable[[Watch], None]) -> None:
        try:
            if self.watch is not None:
                stop(self.watch)
        finally:
            for logger in self._opened:
                logger.close()
            self._opened, self.watch = [], None

    def _look(self, state: Any) -> None:
        if self.watch is not None:
            self.watch.step(state.global_step, epoch=int(state.epoch or 0))

    def _resume(self, args: Any, state: Any) -> None:
        given = args.resume_from_checkpoint
        folder = given if isinstance(given, str) else os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        path = Path(folder, STATE)
        if self.watch is not None and state.global_step and path.is_file():
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(found, dict):
                    raise TypeError(f"holds a {type(found).__name__}, expected a dictionary")
            except Exception as error:  # truncated files raise errors of PyTorch, zipfile or pickle
                reason = f"{type(error).__name__}: {error}"
                warn(f"attn_monitor: {path} cannot be read, so film strips start at this step. {reason}")
            else:
                self.watch.load_state_dict(found)

    def _loggers_of(self, args: Any) -> list[Any]:
        """Return the loggers of ``report_to`` that accept pictures."""
        loggers = current_runs(args.report_to)
        if "tensorboard" in args.report_to:
            from torch.utils.tensorboard import SummaryWriter

            folder = os.getenv("TENSORBOARD_LOGGING_DIR") or getattr(args, "logging_dir", None)
            self._opened = [SummaryWriter(os.path.expanduser(folder or os.path.join(args.output_dir, "runs")))]
            loggers += self._opened
        return loggers


def current_runs(report_to: Sequence[str]) -> list[Any]:
    """Return the runs that transformers has opened for ``report_to``; a tracker without a run is a warning."""
    runs: list[Any] = []
    for package in [name for name in CURRENT_RUN if name in report_to]:
        try:
            run = CURRENT_RUN[package](importlib.import_module(package))
        except Exception as error:  # some raise where no run is open
            warn(f"attn_monitor: no run of {package} is found, so it gets no attention maps. {error}")
        else:
            runs += [] if run is None else [run]
    return runs


def _in_batches(probe: Any, loader: Any) -> Any:
    """Batch a data set with the collator of the Trainer's loader; return anything else unchanged."""
    if isinstance(probe, ProbeOptions):
        return replace(probe, images=loader if probe.images is None else _in_batches(probe.images, loader))
    is_samples = is_data(probe) and hasattr(probe, "__getitem__") and not hasattr(probe, "collate_fn")
    if not is_samples or not hasattr(loader, "collate_fn"):
        return probe
    return DataLoader(probe, collate_fn=loader.collate_fn)
