"""Images of a Lightning run's own data, where no probe is given: of its data sets, its sanity check, or a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from attn_monitor.probe.normalisation import declared_statistics
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.publish.failures import Failures
from attn_monitor.train.batch_images import find_images
from attn_monitor.train.lightning_run import changes_batches
from attn_monitor.train.probe_search import (
    TRAINING_CAPTION,
    VALIDATION_CAPTION,
    probe_from_batch,
    probe_from_images,
    probe_from_loaders,
)


class LightningImages:
    """Up to ``count`` images of one run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._checked: Tensor | None = None  # images of the sanity check

    def keep(self, batch: Any) -> None:
        """Remember images of a sanity check's batch, for a validation data set that cannot be asked for others."""
        lacking = self.count - (0 if self._checked is None else len(self._checked))
        images = find_images(batch) if lacking > 0 else None
        if images is None:
            return
        images = images[:lacking].detach().cpu()
        if self._checked is None:
            self._checked = images
        elif self._checked.shape[1:] == images.shape[1:]:
            self._checked = torch.cat([self._checked, images])

    def forget(self) -> None:
        """Drop what was kept."""
        self._checked = None

    def of_data_sets(self, trainer: pl.Trainer, failures: Failures) -> ProbeBatch | None:
        """Validation images, else those of the sanity check, else of the training data set; None where all fail."""
        validation, training = trainer.val_dataloaders, trainer.train_dataloader
        # Images are changed on the way to the model: those of the data set are not what it sees.
        as_is = not changes_batches(trainer)

        def ask(loaders: Any, caption: str) -> ProbeBatch | None:
            find = partial(probe_from_loaders, loaders, self.count, caption=caption)
            return failures.result_of(f"finding a {caption}", find)

        probe = ask(validation, VALIDATION_CAPTION) if as_is else None
        if probe is None and self._checked is not None:
            probe = probe_from_images(
                self._checked, caption=VALIDATION_CAPTION, declared=declared_statistics([validation, training])
            )
        return ask(training, TRAINING_CAPTION) if probe is None and as_is else probe

    def of_batch(self, batch: Any, trainer: pl.Trainer) -> ProbeBatch:
        """Those of a training batch. Raises `ProbeError` where it holds none."""
        declared = declared_statistics(trainer.train_dataloader)
        return probe_from_batch(batch, self.count, caption=TRAINING_CAPTION, declared=declared)
