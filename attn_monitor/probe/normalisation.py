"""Infer the mean and std that normalised images, from the images or from the data set's transforms."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_monitor.errors import ProbeError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EIGHT_BIT_TOLERANCE = 0.05  # mean distance from whole grey levels up to which images count as 8-bit
MAX_OBJECTS = 2000  # objects to search below a data set for transforms


@dataclass(frozen=True)
class Statistics:
    """A normalisation, with pixels = images · std + mean in 0 to 1.

    Args:
        mean: One number per channel.
        std: One number per channel.
        source: Name for messages.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __str__(self) -> str:
        numbers = (", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return "{} (mean {}; std {})".format(self.source, *numbers)


COMMON_STATISTICS = (
    Statistics(IMAGENET_MEAN, IMAGENET_STD, "ImageNet's statistics"),
    Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "the statistics 0.5 and 0.5"),
    Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "CLIP's statistics"),
    Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "CIFAR-10's statistics"),
    Statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "CIFAR-10's statistics, as often copied"),
    Statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "CIFAR-100's statistics"),
    Statistics((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), "Tiny ImageNet's statistics"),
    Statistics((0.5,), (0.5,), "the statistics 0.5 and 0.5"),
    Statistics((0.1307,), (0.3081,), "MNIST's statistics"),
)


def check_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raise `ProbeError` unless there is one number for each channel."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            default = ". Pass mean= and std= of the model's own preparation" * (tuple(mean) == tuple(IMAGENET_MEAN))
            raise ProbeError(
                f"{name}: received {len(values)} values, expected one for each of {channels} channels{default}"
            )


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std for (B, C, *size); bytes become 0 to 1 first."""
    values = images.float() / 255 if images.dtype == torch.uint8 else images
    return (values - _of_channels(mean, images)) / _of_channels(std, images)


def _of_channels(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, *(1 for _ in images.shape[2:]))


def infer_statistics(images: Tensor, declared: Sequence[Statistics] = ()) -> Statistics:
    """Infer the normalisation of images.

    It is the candidate that gives whole 8-bit values when undone; otherwise the first declared one that gives values in
    0 to 1; otherwise none if one or three channels are in 0 to 1; otherwise one that stretches their
    contrast to percentiles, of each channel where these are no colours.

    Args:
        images: Normalised images, (B, C, *size).
        declared: Candidates found in the data set's transforms.
    """
    channels, images = images.shape[1], images.float()
    plain = Statistics((0.0,) * channels, (1.0,) * channels, "no normalisation")
    bytes_ = Statistics((0.0,) * channels, (1 / 255,) * channels, "values of 0 to 255")
    declared = [s for s in declared if len(s.mean) == channels]
    known = [s for s in COMMON_STATISTICS if len(s.mean) == channels]
    distances = [(_distance_from_eight_bit(images, s), s) for s in (*declared, plain, bytes_, *known)]
    distance, best = min(distances, key=lambda found: found[0])
    if distance < EIGHT_BIT_TOLERANCE:
        return best
    # Reflectances may be from 0 to 1 and all dark; only of pictures is it known that 1 is white.
    for statistics in (*declared, *([plain] if channels in (1, 3) else [])):
        shown = _denormalise(images, statistics)
        if shown.min() > -0.02 and shown.max() < 1.02:
            return statistics
    # Colours keep their balance; bands of other instruments have units of their own.
    apart = images.transpose(0, 1).flatten(1) if channels not in (1, 3) else images.reshape(1, -1)
    values = apart[:, :: max(1, apart.shape[1] // 100_000)].nan_to_num()
    ends = torch.tensor([0.005, 0.995], dtype=values.dtype, device="cpu")
    low, high = torch.quantile(values, ends, dim=1)
    span = (high - low).clamp_min(1e-8)
    mean, std = ((v.tolist() * channels)[:channels] for v in (-low / span, 1 / span))
    source = "an unknown normalisation, stretched to the 0.5-99.5 percentiles"
    return Statistics(tuple(mean), tuple(std), source)


def _denormalise(images: Tensor, statistics: Statistics) -> Tensor:
    return images * _of_channels(statistics.std, images) + _of_channels(statistics.mean, images)


def _distance_from_eight_bit(images: Tensor, statistics: Statistics) -> float:
    """Return the mean distance of denormalised values from whole grey levels, or infinity if some are outside 0-255."""
    levels = _denormalise(images, statistics) * 255
    if not (levels.min() > -0.5 and levels.max() < 255.5):  # NaN too
        return float("inf")
    return float((levels - levels.round()).abs().mean())


def declared_statistics(data: Any) -> list[Statistics]:
    """Collect every mean and std in a data set, its transforms or an image processor below it, the nearest first."""
    found: list[Statistics] = []
    for owner in _walk(data):
        space = owner if isinstance(owner, dict) else _attributes(owner)
        for names in (("mean", "std"), ("image_mean", "image_std")):
            mean, std = (_numbers(space.get(name)) for name in names)
            if mean and len(mean) == len(std) and 0 not in std:
                found.append(Statistics(mean, std, f"the statistics of {type(owner).__name__}"))
    return found


def _numbers(value: Any) -> tuple[float, ...]:
    """Return numbers per channel; empty if the value is something else."""
    try:
        numbers = np.asarray(value, dtype=float).ravel()
    except (TypeError, ValueError):
        return ()
    return tuple(numbers.tolist()) if value is not None and 0 < numbers.size <= 32 else ()


def _walk(data: Any) -> Iterator[Any]:
    """Yield the object and what it holds, breadth first: attributes, and items of short lists, tuples and dicts."""
    waiting, seen = deque([data]), {id(data)}
    while waiting and len(seen) < MAX_OBJECTS:
        owner = waiting.popleft()
        yield owner
        for part in _parts(owner):
            if id(part) not in seen and not isinstance(part, (str, bytes, int, float, Tensor, np.ndarray)):
                seen.add(id(part))
                waiting.append(part)


def _parts(owner: Any) -> list[Any]:
    if isinstance(owner, (list, tuple, dict)):
        items = list(owner.values()) if isinstance(owner, dict) else list(owner)
        return items if len(items) <= 64 else []  # longer ones are samples
    bound = getattr(owner, "__self__", None) if inspect.isroutine(owner) else None  # of a collate function
    closure = inspect.getclosurevars(owner).nonlocals.values() if inspect.isfunction(owner) else ()
    partial = (owner.func, *owner.args, *owner.keywords.values()) if isinstance(owner, functools.partial) else ()
    return [part for part in (*_attributes(owner).values(), bound, *closure, *partial) if part is not None]


def _attributes(owner: Any) -> dict[str, Any]:
    """Return an object's attributes, with children and buffers of modules, without running foreign properties."""
    if isinstance(owner, (type, ModuleType)):
        return {}
    own: dict[str, Any] = dict(getattr(owner, "__dict__", {}))
    return {**own, **own.get("_buffers", {}), **own.get("_modules", {})} if isinstance(owner, nn.Module) else own
