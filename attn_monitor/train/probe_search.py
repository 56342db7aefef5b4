"""Make a probe where none was given: of evenly spaced images of a data set, else of those in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from attn_monitor.capture.isolation import random_state_restored
from attn_monitor.errors import ProbeError
from attn_monitor.probe.normalisation import Statistics, declared_statistics, infer_statistics
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.train.batch_images import describe_batch, find_images

TRAINING_CAPTION, VALIDATION_CAPTION = "training crop", "validation image"


def probe_from_batch(
    batch: Any, num_images: int, *, caption: str = "original", declared: Sequence[Statistics] = ()
) -> ProbeBatch:
    """Of the first images in a batch, see `find_images`; `ProbeError` where it holds none."""
    images = find_images(batch)
    if images is None:
        raise ProbeError(
            "probe=None: the batch holds no floating-point tensor of images (batch, channels, height, width); received "
            f"{describe_batch(batch)}. Pass probe= a folder, a tensor or a ProbeBatch"
        )
    return probe_from_images(images[:num_images], caption=caption, declared=declared)


def probe_from_images(images: Tensor, *, caption: str = "original", declared: Sequence[Statistics] = ()) -> ProbeBatch:
    """Of images (B, C, H, W) as the model takes them; mean and std are inferred, see `infer_statistics`."""
    images = images.detach().float().cpu().clone()
    found = infer_statistics(images, declared)
    return ProbeBatch(images, mean=found.mean, std=found.std, caption=caption, source=str(found))


def probe_from_loaders(
    loaders: Any, num_images: int, model: nn.Module, *, caption: str = "original"
) -> ProbeBatch | None:
    """Of evenly spaced images of the first data set in these loaders that has a length; None where there is none.

    The images are loaded by a loader of our own with the same workers and `collate_fn`, one worker at most, so that
    neither the run's loader nor any random state moves.
    """
    for loader in pytree.tree_leaves(loaders):
        dataset = getattr(loader, "dataset", None)
        if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not _length(dataset):
            continue
        images = _load_images(loader, _evenly_spaced_indices(loader, num_images), model)
        if images is not None:
            declared = declared_statistics([dataset, loader.collate_fn])
            return probe_from_images(images[:num_images], caption=caption, declared=declared)
    return None


def _length(dataset: Any) -> int:
    """That of a data set with indices, 0 where it has none."""
    try:
        return len(dataset) if hasattr(dataset, "__getitem__") else 0
    except (TypeError, NotImplementedError):
        return 0


def _evenly_spaced_indices(loader: DataLoader[Any], count: int) -> list[int]:
    """Indices at even distances over what the loader draws from, first and last included."""
    sampler = loader.sampler
    if isinstance(sampler, SubsetRandomSampler):
        known: Sequence[int] = sorted(int(i) for i in sampler.indices)
    else:
        known = range(_length(loader.dataset))
    return [known[round(i)] for i in np.linspace(0, len(known) - 1, min(count, len(known)))]


def _load_images(loader: DataLoader[Any], indices: list[int], model: nn.Module) -> Tensor | None:
    """The images in one batch of these indices, if there are any."""
    with random_state_restored(model):
        batches = DataLoader(
            loader.dataset,
            batch_sampler=[indices],
            num_workers=min(1, loader.num_workers),
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),
        )
        return find_images(next(iter(batches)))
