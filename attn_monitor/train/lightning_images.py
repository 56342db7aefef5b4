"""Take images of a Lightning run's own data if no probe is given: its data sets, its sanity check, or a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from attn_monitor.background.failures import Failures
from attn_monitor.probe.normalisation import declared_statistics
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.train.backbone_inputs import BackboneInputs, prepared_probe
from attn_monitor.train.batch_images import find_images
from attn_monitor.train.probe_search import (
    TRAINING_CAPTION,
    VALIDATION_CAPTION,
    probe_from_batch,
    probe_from_images,
    probe_from_loaders,
)
from attn_monitor.train.targets import FindTargets


class LightningImages:
    """Find up to ``count`` images in the data of one run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.are_known = False  # whether these images are known to be what the model receives
        self._checked: Tensor | None = None  # images of the sanity check
        self._batch: Tensor | None = None  # images of the present batch of the sanity check
        self._inputs: BackboneInputs | None = None  # observed in the same batch
        self._seen: BackboneInputs | None = None  # of the first batch that was seen to enter the models

    def look(self, batch: Any, targets: FindTargets, root: nn.Module) -> None:
        """Observe a batch of the sanity check, in case the validation data set cannot be read by index.

        Args:
            batch: the batch, before its step.
            targets: finds the backbones that it may enter.
            root: the module around them.
        """
        lacking = self.count - (0 if self._checked is None else len(self._checked))
        if lacking > 0:
            try:
                with targets() as found:
                    models = list(found.models.values())
            except Exception:  # reported at the first snapshot
                models = []
            self._batch, self._inputs = find_images(batch), BackboneInputs(models, batch, self.count, root)

    def keep(self) -> None:
        """After the step, keep the images as the model received them, else as the batch holds them."""
        inputs, batch = self._inputs, self._batch
        self._inputs = self._batch = None
        if inputs is None:
            return
        inputs.stop()
        images = inputs.entered[0] if inputs.entered else batch
        if inputs.entered and self._seen is None:
            self._seen, self._checked = inputs, None
        if images is None:
            return
        images = images[: self.count].detach().cpu()
        if self._checked is None:
            self._checked = images
        elif self._checked.shape[1:] == images.shape[1:]:
            self._checked = torch.cat([self._checked, images])[: self.count]

    def forget(self) -> None:
        """Drop all images and hooks."""
        if self._inputs is not None:
            self._inputs.stop()
        self._checked = self._batch = self._inputs = self._seen = None

    def of_data_sets(self, trainer: pl.Trainer, failures: Failures) -> ProbeBatch | None:
        """Return validation images, else those of the sanity check, else training images; None if all fail."""
        validation, training = trainer.val_dataloaders, trainer.train_dataloader
        # Where a hook changes batches on their way to the device, the data set's images are not what the model sees.
        as_is = not _changes_batches(trainer)

        def ask(loaders: Any, caption: str) -> ProbeBatch | None:
            find = partial(probe_from_loaders, loaders, self.count, caption=caption)
            return failures.result_of(f"finding a {caption}", find)

        self.are_known = self._seen is not None
        probe = ask(validation, VALIDATION_CAPTION) if as_is else None
        if probe is not None and self._seen is not None:
            probe = prepared_probe(probe, self._seen)
        if probe is None and self._checked is not None:
            probe = probe_from_images(
                self._checked, caption=VALIDATION_CAPTION, declared=declared_statistics([validation, training])
            )
        if probe is None:
            self.are_known = False
            probe = ask(training, TRAINING_CAPTION) if as_is else None
        return probe

    def of_batch(self, batch: Any, trainer: pl.Trainer) -> ProbeBatch:
        """Take the images of a training batch. Raises `ProbeError` if it holds none."""
        declared = declared_statistics(trainer.train_dataloader)
        return probe_from_batch(batch, self.count, caption=TRAINING_CAPTION, declared=declared)


def _changes_batches(trainer: pl.Trainer) -> bool:
    """Whether the module or the data module overrides a hook that changes batches on their way to the device."""
    hooks = ("on_before_batch_transfer", "on_after_batch_transfer")
    sources = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    owners = (getattr(type(source), hook) for source in sources if source is not None for hook in hooks)
    return any(not owner.__module__.endswith(".core.hooks") for owner in owners)  # in either Lightning namespace
