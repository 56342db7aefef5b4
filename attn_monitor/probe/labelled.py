"""`EvaluationOptions`: images with labels, by which features are judged in a run, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_monitor.errors import ArgumentError, ProbeError
from attn_monitor.probe.image_folder import images_in, read_files
from attn_monitor.probe.probe_batch import ProbeBatch

Labelled = str | os.PathLike[str] | tuple[Tensor, Tensor] | Dataset  # type: ignore[type-arg]  # as in options.py
"""A folder of a folder for each class, (images, labels), or a data set of (image, label)."""

EXPECTED = (
    "expected a folder with a folder of images for each class, tensors (images, labels), or a data set of "
    "(image, label)"
)
HELD_OUT = 4  # of each class every fourth image is for the test


@dataclass(frozen=True, eq=False)
class EvaluationOptions:
    """Images with labels, by which the features of a run's backbones are judged: kNN and a linear probe.

    Args:
        data: a folder with a folder of images for each class; tensors (images, labels), (n, channels, H, W) normalised
            as the model expects and (n,) integers; or a data set of (image, label) without augmentation.
        test: the same for the test; None holds out every fourth image of each class of ``data``.
        every: snapshots between two evaluations; the first and the last snapshot are always evaluated.
        max_images: the most images of ``data``, and of ``test``, that are used, evenly spaced.
        k: number of neighbours of the kNN classifier, at least 1.
        batch_size: images that run together.
        tolerance: raise a health flag where kNN loses more than this share, 0 to 1, of what the first evaluation was
            above chance, and more than chance itself explains.

    Raises:
        ArgumentError: A value is invalid.

    Example:
        >>> images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 4
        >>> EvaluationOptions((images, labels), every=5).every
        5
        >>> EvaluationOptions("no/such/folder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        attn_monitor.errors.ArgumentError: evaluation: no/such/folder holds 0 folders with images; expected a folder ...
    """

    data: Labelled
    test: Labelled | None = None
    every: int = 1
    max_images: int = 2000
    k: int = 20
    batch_size: int = 64
    tolerance: float = 0.2

    def __str__(self) -> str:
        """Describe what results depend on, but not the images themselves, in one line."""
        data = [_described(source) for source in (self.data, self.test) if source is not None]
        return f"{', '.join(data)}; every={self.every}, max_images={self.max_images}, k={self.k}"

    def __post_init__(self) -> None:
        for name in ("every", "max_images", "k", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"evaluation: {name}={value!r}; expected a whole number of at least 1")
        if not isinstance(self.tolerance, (int, float)) or not 0 < self.tolerance <= 1:
            raise ArgumentError(f"evaluation: tolerance={self.tolerance!r}; expected a share above 0 and up to 1")
        for source in (self.data, self.test):
            if source is not None:
                _check(source)
        labels = _labels(self.data)
        if labels is not None and (len(set(labels)) < 2 or (self.test is None and not any(held_out(labels)))):
            most = max((labels.count(label) for label in set(labels)), default=0)
            raise ArgumentError(
                f"evaluation: {len(labels)} images of {len(set(labels))} classes, at most {most} of one; expected two "
                f"classes, and {HELD_OUT} images of one where no test= is given"
            )

    @classmethod
    def of(cls, evaluation: EvaluationOptions | Labelled | None) -> EvaluationOptions | None:
        """Return labelled images as options; None if there are none."""
        return evaluation if evaluation is None or isinstance(evaluation, EvaluationOptions) else cls(evaluation)


def batches(source: Labelled, probe: ProbeBatch, count: int, size: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Read at most ``count`` images of a source, evenly spaced, with their labels.

    Args:
        source: as in `EvaluationOptions`.
        probe: gives the size and the normalisation of a folder's images.
        count: the most images.
        size: images at a time.

    Yields:
        Images, (size, channels, H, W), and their labels.

    Raises:
        ProbeError: An image cannot be read, or a sample is no (image, label).
    """
    if isinstance(source, (str, os.PathLike)):
        files = class_files(source)
        for part in _parts(_evenly_spaced(len(files), count), size):
            few = [files[i] for i in part]
            height, width = probe.images.shape[-2:]
            read = read_files([file for file, _ in few], f"evaluation {source}", (height, width), len(probe.mean))
            if not read.to_1:  # the probe's mean and std say how such numbers are shown, and not what a model takes
                raise ProbeError(
                    f"evaluation {source}: {few[0][0].name} holds numbers in a unit of its own, expected bytes. Pass a "
                    "data set of (image, label) with images as the model takes them"
                )
            pixels = read.pixels / 255 if read.pixels.dtype == torch.uint8 else read.pixels
            mean, std = (torch.tensor(values, device="cpu")[:, None, None] for values in (probe.mean, probe.std))
            yield (pixels - mean) / std, [label for _, label in few]
    elif isinstance(source, (tuple, list)):
        images, labels = source
        for part in _parts(_evenly_spaced(len(images), count), size):
            yield images[part], labels[part].tolist()
    else:
        for part in _parts(_evenly_spaced(len(source), count), size):  # type: ignore[arg-type]
            samples = [_sample(source, i) for i in part]
            yield torch.stack([image for image, _ in samples]), [label for _, label in samples]


def class_files(folder: str | os.PathLike[str]) -> list[tuple[Path, int]]:
    """List the images of a folder of class folders, with the number of each one's class in order of their names."""
    found = [images_in(path) for path in sorted(Path(folder).glob("*")) if path.is_dir()]
    return [(file, label) for label, files in enumerate(filter(None, found)) for file in files]


def held_out(labels: Sequence[int]) -> list[bool]:
    """Say of each image whether it is for the test: every fourth of its class.

    Example:
        >>> held_out([0, 0, 1, 0, 0])
        [False, False, False, False, True]
    """
    seen: dict[int, int] = {}
    chosen = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        chosen.append(seen[label] % HELD_OUT == 0)
    return chosen


def _labels(source: Labelled) -> list[int] | None:
    """Return the labels of a source that are known without reading images."""
    if isinstance(source, (str, os.PathLike)):
        return [label for _, label in class_files(source)]
    return source[1].tolist() if isinstance(source, (tuple, list)) else None


def _described(source: Labelled) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.path.realpath(source)
    return f"{len(source[1]) if isinstance(source, (tuple, list)) else len(source)} samples"  # type: ignore[arg-type]


def _check(source: Any) -> None:
    """Raise `ArgumentError` unless a source is of one of the kinds in ``EXPECTED``."""
    if isinstance(source, (str, os.PathLike)):
        classes = {label for _, label in class_files(source)}
        if len(classes) < 2:
            raise ArgumentError(f"evaluation: {os.fspath(source)} holds {len(classes)} folders with images; {EXPECTED}")
    elif isinstance(source, (tuple, list)):
        if len(source) != 2 or not all(isinstance(part, Tensor) for part in source):
            raise ArgumentError(f"evaluation: received {len(source)} {type(source).__name__} items; {EXPECTED}")
        images, labels = source
        whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
        if images.ndim != 4 or not images.is_floating_point() or labels.shape != images.shape[:1] or not whole:
            raise ArgumentError(
                f"evaluation: received images {tuple(images.shape)} {images.dtype} and labels {tuple(labels.shape)} "
                f"{labels.dtype}; expected floating-point images (n, channels, H, W) and n whole numbers"
            )
    elif isinstance(source, (Tensor, bytes, type)) or not (
        hasattr(source, "__len__") and hasattr(source, "__getitem__")
    ):
        raise ArgumentError(f"evaluation: received a {type(source).__name__}; {EXPECTED}")


def _sample(source: Any, index: int) -> tuple[Tensor, int]:
    sample = source[index]
    pair = sample if isinstance(sample, (tuple, list)) and len(sample) >= 2 else (None, None)
    image, label = pair[0], pair[1]
    if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
        raise ProbeError(
            f"evaluation: sample {index} is a {type(sample).__name__}, expected (image, label) with a floating-point "
            "image (channels, H, W), normalised as the model expects"
        )
    try:
        return image, int(label)
    except (TypeError, ValueError) as error:
        raise ProbeError(f"evaluation: the label of sample {index} is {label!r}, expected a whole number") from error


def _evenly_spaced(total: int, count: int) -> list[int]:
    return list(range(total)) if total <= count else np.linspace(0, total - 1, count).round().astype(int).tolist()


def _parts(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
