"""Find images to watch where none were given: evenly spaced ones of a data set, else those of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from attn_monitor.capture.isolation import random_state_restored
from attn_monitor.errors import ProbeError
from attn_monitor.record.normalisation import Statistics, declared_in, find_statistics
from attn_monitor.record.probe import ProbeBatch

CROP, VALIDATION = "training crop", "validation image"  # how they are captioned


def adopt_images(
    batch: Any, count: int, *, caption: str = "original", declared: Sequence[Statistics] = ()
) -> ProbeBatch:
    """Make a probe of the images in a batch; of several crops, the largest."""
    images = find_images(batch)
    if images is None:
        raise ProbeError(
            "probe=None: the batch holds no floating-point tensor of images (batch, channels, height, width); received "
            f"{describe_batch(batch)}. Pass probe= a folder, a tensor or a ProbeBatch"
        )
    return probe_of(images[:count], caption=caption, declared=declared)


def probe_of(images: Tensor, *, caption: str = "original", declared: Sequence[Statistics] = ()) -> ProbeBatch:
    """A probe of images as the model takes them, whose normalisation is found out."""
    images = images.detach().float().cpu().clone()
    found = find_statistics(images, declared)
    return ProbeBatch(images, mean=found.mean, std=found.std, caption=caption, source=str(found))


def adopt_from_loaders(loaders: Any, count: int, model: nn.Module, *, caption: str = "original") -> ProbeBatch | None:
    """Evenly spaced images of the first data set in these loaders that has a length; None where there is none.

    The data set is asked by a loader of our own with the same workers and `collate_fn`, one worker at most, so that
    neither the run's loader nor any random state moves.
    """
    for loader in _loaders_in(loaders):
        dataset = getattr(loader, "dataset", None)
        if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not _length(dataset):
            continue
        images = _images_at(loader, _evenly_spaced(loader, count), model)
        if images is not None:
            return probe_of(images[:count], caption=caption, declared=declared_in([dataset, loader.collate_fn]))
    return None


def _loaders_in(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        for item in loaders:
            yield from _loaders_in(item)
    elif loaders is not None:
        yield loaders


def _length(dataset: Any) -> int:
    try:
        return len(dataset) if hasattr(dataset, "__getitem__") else 0
    except (TypeError, NotImplementedError):
        return 0


def _evenly_spaced(loader: DataLoader[Any], count: int) -> list[int]:
    """Indices at even distances over what the loader draws from, first and last included."""
    sampler = loader.sampler
    known: Sequence[int] = (
        sampler.indices if isinstance(sampler, SubsetRandomSampler) else range(_length(loader.dataset))
    )
    known = sorted(int(i) for i in known) if not isinstance(known, range) else known
    return [known[round(i)] for i in np.linspace(0, len(known) - 1, min(count, len(known)))]


def _images_at(loader: DataLoader[Any], indices: list[int], model: nn.Module) -> Tensor | None:
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


def find_images(batch: Any) -> Tensor | None:
    """The largest image tensor, else the first, in nested lists, tuples and dicts; keys that name images come first."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim == 4 and batch.is_floating_point() and batch.shape[1] <= 32 else None
    if isinstance(batch, dict):
        wanted = ("global", "image", "pixel", "img", "view", "x")
        ranks = {key: next((r for r, w in enumerate(wanted) if w in str(key).lower()), len(wanted)) for key in batch}
        for rank in sorted(set(ranks.values())):
            found = find_images([batch[key] for key in batch if ranks[key] == rank])
            if found is not None:
                return found
        return None
    if isinstance(batch, (list, tuple)):
        images = [found for item in batch if (found := find_images(item)) is not None]
        return max(images, key=lambda image: image.shape[-2] * image.shape[-1], default=None)
    if hasattr(batch, "data") and isinstance(batch.data, dict):  # Hugging Face's BatchEncoding and BatchFeature
        return find_images(batch.data)
    return None


def describe_batch(batch: Any) -> str:
    """Shape of a batch in a few words, for error messages."""
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)} {batch.dtype}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{k}: {describe_batch(v)}" for k, v in list(batch.items())[:6]) + "}"
    if isinstance(batch, (list, tuple)):
        return "[" + ", ".join(describe_batch(v) for v in batch[:6]) + "]"
    return type(batch).__name__
