"""Make a probe from evenly spaced images of a data set, else from a batch, if the user gave none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, SubsetRandomSampler, default_collate
from torch.utils.data._utils import worker

from attn_monitor.errors import NoImagesError
from attn_monitor.image_axes import SHAPES, likely_axes
from attn_monitor.probe.normalisation import Statistics, declared_statistics, infer_statistics
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.train.backbone_inputs import BackboneInputs, alike, find_preparation, prepared_probe
from attn_monitor.train.batch_images import describe_batch, find_images
from attn_monitor.train.process_copy import call_in_fork

TRAINING_CAPTION, VALIDATION_CAPTION = "training crop", "validation image"


def probe_from_batch(
    batch: Any, num_images: int, *, caption: str = "original", declared: Sequence[Statistics] = ()
) -> ProbeBatch:
    """Make a probe of the first images in a batch.

    Args:
        batch: images in any container, see `find_images`.
        num_images: how many to take at most.
        caption: what the images are, for pictures.
        declared: candidates for mean and std, found in transforms.

    Raises:
        NoImagesError: The batch holds no floating-point images.
    """
    images = find_images(batch)
    if images is None:
        raise NoImagesError(
            f"probe=None: the batch holds no floating-point tensor of images {SHAPES}; received "
            f"{describe_batch(batch)}. Pass probe= a folder, a tensor or a ProbeBatch"
        )
    return probe_from_images(images[:num_images], caption=caption, declared=declared)


def probe_from_images(images: Tensor, *, caption: str = "original", declared: Sequence[Statistics] = ()) -> ProbeBatch:
    """Make a probe of images as the model takes them; `infer_statistics` finds mean and std.

    Args:
        images: (B, C, H, W), or of another of the shapes that `find_images` knows, normalised.
        caption: what the images are, for pictures.
        declared: candidates for mean and std, found in transforms.
    """
    images = images.detach().float().cpu().clone()
    found = infer_statistics(likely_axes(images.shape).channels_first(images), declared)
    return ProbeBatch(images, mean=found.mean, std=found.std, caption=caption, source=str(found))


def probe_from_loaders(loaders: Any, num_images: int, *, caption: str = "original") -> ProbeBatch | None:
    """Make a probe of evenly spaced images of the first data set with indices in these loaders; None without one.

    The data set is read in a copy of this process, see `call_in_fork`, so that neither the run's loader, nor its data
    set, nor any random state changes.

    Args:
        loaders: loaders in any container.
        num_images: how many images to take at most.
        caption: what the images are, for pictures.

    Raises:
        CopyError: This process cannot be copied, or the copy does not answer.
    """
    if not pytree.tree_leaves(loaders):
        return None
    found = call_in_fork(lambda: _evenly_spaced_images(loaders, num_images))
    return None if found is None else probe_from_images(found[0], caption=caption, declared=found[1])


def probe_from_first_batch(data: Any, num_images: int, *, caption: str = "original") -> ProbeBatch:
    """Make a probe of what a loader or a stream of samples yields first, in a copy of this process.

    Args:
        data: an iterable of batches or samples.
        num_images: how many images to take at most.
        caption: what the images are, for pictures.

    Raises:
        NoImagesError: It yields no floating-point images.
        CopyError: This process cannot be copied, or the copy does not answer.
    """

    def first() -> ProbeBatch:
        stream = iter(data)
        batch = next(stream, None)
        if find_images(batch) is None:
            samples = [batch, *islice(stream, num_images - 1)]
            with suppress(TypeError, RuntimeError):  # then `probe_from_batch` describes the object as it is
                batch = default_collate(samples)
        return probe_from_batch(batch, num_images, caption=caption)

    return call_in_fork(first)


def probe_from_source(source: Any, num_images: int) -> ProbeBatch:
    """Make a probe of a data set or a loader: of evenly spaced images if it has indices, else of its first batch.

    Args:
        source: the data set, its loader, or an iterable of batches or samples.
        num_images: how many images to take at most.

    Raises:
        NoImagesError: It yields no floating-point images.
        CopyError: This process cannot be copied, or the copy does not answer.
    """
    loader = source if hasattr(source, "collate_fn") else DataLoader(source)
    caption = TRAINING_CAPTION if _shuffles(loader) else "original"
    batches = isinstance(source, list) and bool(source) and _is_batch(source[0])
    found = None if batches else probe_from_loaders([loader], num_images, caption=caption)
    return found or probe_from_first_batch(source, num_images, caption=caption)


def what_to_watch(watched: ProbeBatch | None, inputs: BackboneInputs, *, given: bool) -> tuple[ProbeBatch | None, str]:
    """Decide after a step whether the watched images are what the models receive.

    Args:
        watched: the present probe, if there is one.
        inputs: what entered the models in the step; an error in its hooks is raised here.
        given: whether the user gave the probe, which is then never replaced.

    Returns:
        The images to watch from now on, None to keep ``watched``; and a message, empty if there is nothing to report.
    """
    if inputs.error is not None:
        raise inputs.error
    if not inputs.entered:
        return None, ""
    entered = probe_from_images(inputs.entered[0], caption=TRAINING_CAPTION)
    if watched is None:
        return entered, ""
    remedy = (
        "ProbeOptions(folder, mean=…, std=…) says how images are normalised, and forward= takes a function of (model, "
        "images) that prepares them"
    )
    if given:
        if alike(watched.images, entered.images):
            return None, ""
        return None, (
            f"the probe's images and those that enter the model in training disagree: {_range(watched.images)} and "
            f"{_range(entered.images)}. Normalise the probe as training does: {remedy}"
        )
    prepared = prepared_probe(watched, inputs)
    if prepared is watched:
        return None, ""
    first = "the first snapshot is that after the first step"
    if prepared is not None:
        return prepared, (
            "the step prepares its batch before the model gets it, and the images that are watched are prepared in the "
            f"same way ({find_preparation(inputs.given, inputs.entered)}); {first}"
        )
    return entered, (
        f"the images of the data and those that enter the model in training disagree: {_range(watched.images)} and "
        f"{_range(entered.images)}. The latter are watched, and {first}. To watch others, pass them as "
        f"ProbeOptions(images, mean=…, std=…), or with forward=, a function of (model, images) that prepares them"
    )


def _range(images: Tensor) -> str:
    return f"values of {images.min():.4g} to {images.max():.4g}"


def _evenly_spaced_images(loaders: Any, num_images: int) -> tuple[Tensor, list[Statistics]] | None:
    for loader in pytree.tree_leaves(loaders):
        dataset = getattr(loader, "dataset", None)
        if not hasattr(loader, "collate_fn") or isinstance(dataset, IterableDataset) or not _length(dataset):
            continue
        images = find_images(_load(loader, _evenly_spaced_indices(loader, num_images)))
        if images is not None:
            plain = images[:num_images].detach().as_subclass(Tensor)
            return plain, declared_statistics([dataset, loader.collate_fn])
    return None


def _length(dataset: Any) -> int:
    """Return the length of a data set with indices, 0 for others."""
    try:
        return len(dataset) if hasattr(dataset, "__getitem__") else 0
    except (TypeError, NotImplementedError):
        return 0


def _evenly_spaced_indices(loader: Any, count: int) -> list[int]:
    """Return evenly spaced indices of the samples that the loader draws from, first and last included."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        known: Sequence[int] = sorted(int(i) for i in sampler.indices)
    else:
        known = range(_length(loader.dataset))
    return [known[round(i)] for i in np.linspace(0, len(known) - 1, min(count, len(known)))]


def _load(loader: Any, indices: Sequence[int]) -> Any:
    """Load the samples of these indices as one batch, set up as in a worker of the loader if it has any."""
    dataset = loader.dataset
    if getattr(loader, "num_workers", 0):
        worker._worker_info = worker.WorkerInfo(id=0, num_workers=1, seed=torch.initial_seed(), dataset=dataset)
        if loader.worker_init_fn is not None:
            loader.worker_init_fn(0)
    samples = dataset.__getitems__(indices) if hasattr(dataset, "__getitems__") else [dataset[i] for i in indices]
    worker._worker_info = None  # with it, collating would use shared memory
    return loader.collate_fn(samples)


def _is_batch(item: Any) -> bool:
    """Whether a list's item holds a batch of grey or colour images, and not one clip or volume."""
    images = find_images(item)
    return images is not None and images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[0] not in (1, 3)


def _shuffles(loader: Any) -> bool:
    """Whether a loader shuffles and so is for training, also if accelerate has wrapped its sampler."""
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", getattr(loader, "sampler", None))
    return sampler is not None and not isinstance(sampler, SequentialSampler)
