"""Validate the arguments of the callback and of `Watch` as soon as they are given."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from attn_monitor.capture.forward import Forward
from attn_monitor.capture.layer_selection import Layers, QuerySpec, check_layers, check_query
from attn_monitor.capture.recorder import Verify, check_verify
from attn_monitor.errors import ArgumentError
from attn_monitor.measure.health import HealthLimits
from attn_monitor.measure.metrics import check_threshold, select_metrics
from attn_monitor.measure.patch_features import check_features
from attn_monitor.probe.probe_batch import ProbeBatch

Probe = str | os.PathLike[str] | Tensor | ProbeBatch
OnError = Literal["warn", "raise"]

NUM_IMAGES, IMAGE_SIZE = 8, 224  # defaults; the size is in pixels


class MonitorSettings:
    """Hold arguments of `AttentionMonitor`, which documents them, after validation.

    Raises:
        ArgumentError: An argument is invalid.
    """

    def __init__(
        self,
        *,
        layers: Layers,
        query: QuerySpec,
        threshold: float,
        metrics: Sequence[str] | str | None,
        health: HealthLimits,
        verify: Verify,
        features: bool,
        gram_step: int | None,
    ) -> None:
        self.layers, self.query, self.threshold = check_layers(layers), check_query(query), check_threshold(threshold)
        select_metrics(metrics)
        self.metrics, self.health, self.verify = metrics, health, check_verify(verify)
        self.features, self.gram_step = features, gram_step
        check_features(features, gram_step)


class ProbeSettings:
    """Hold which images to watch and by which statistics to show them, validated but not yet loaded.

    Args:
        probe: a folder, a tensor (images, channels, H, W), a `ProbeBatch`, data (see ``data``), or None.
        num_images: how many images to take from a folder or from data; None is 8.
        image_size: size of a folder's images in pixels, one number or (height, width); None is 224.
        masks: folder of ground-truth masks for a folder of images.
        mean: one number a channel, by which images are normalised; None infers it.
        std: one positive number a channel, given together with ``mean``.
        data: whether ``probe`` may be a data set or its loader.

    Raises:
        ArgumentError: An argument is invalid, or could have no effect.
    """

    def __init__(
        self,
        probe: Any,
        *,
        num_images: int | None,
        image_size: int | tuple[int, int] | None,
        masks: str | os.PathLike[str] | None = None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        data: bool = False,
    ) -> None:
        self.num_images, self.image_size = check_probe(probe, num_images, image_size, masks, data=data)
        self.statistics = check_statistics(probe, mean, std)
        self.data: Any = probe if data and is_data(probe) else None
        self.probe: Probe | None = None if self.data is not None else probe
        self.masks = masks

    def load(self) -> ProbeBatch | None:
        """Load the images that were given; None if they come from data. Raises `ProbeError`."""
        if self.probe is None:
            return None
        mean, std = self.statistics or (None, None)
        return ProbeBatch.of(
            self.probe, size=self.image_size, num_images=self.num_images, masks=self.masks, mean=mean, std=std
        )

    def with_statistics(self, probe: ProbeBatch) -> ProbeBatch:
        """Apply the user's mean and std, if any, to images that were found in data."""
        return probe.with_statistics(*self.statistics) if self.statistics else probe


def is_data(probe: object) -> bool:
    """Whether an object acts as a data set or a loader: it has samples with indices, or yields batches."""
    if isinstance(probe, (str, bytes, os.PathLike, Tensor, ProbeBatch, Mapping, nn.Module, type)):
        return False
    return hasattr(probe, "__iter__") or (hasattr(probe, "__len__") and hasattr(probe, "__getitem__"))


def check_on_error(on_error: str) -> OnError:
    """Return ``on_error`` if it is "warn" or "raise"; `ArgumentError` otherwise."""
    if on_error not in get_args(OnError):
        raise ArgumentError(f'on_error={on_error!r}: expected "warn" or "raise"')
    return on_error  # type: ignore[return-value]


def check_statistics(
    probe: object, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and std as floats, None if neither is given; `ArgumentError` if they are invalid."""
    if mean is None and std is None:
        return None
    if mean is None or std is None or len(mean) != len(std) or not len(mean) or not all(value > 0 for value in std):
        raise ArgumentError(f"mean={mean!r}, std={std!r}: expected both, one number a channel, and no std of 0")
    if isinstance(probe, ProbeBatch):
        raise ArgumentError(f"mean={mean!r}, std={std!r}: probe is a ProbeBatch, which takes mean and std of its own")
    return tuple(map(float, mean)), tuple(map(float, std))


def check_probe(
    probe: object,
    num_images: int | None,
    image_size: int | Sequence[int] | None,
    masks: str | os.PathLike[str] | None,
    *,
    data: bool = False,
) -> tuple[int, int | tuple[int, int]]:
    """Validate the arguments about images, see `ProbeSettings`.

    Returns:
        How many images to take, and their size in pixels.

    Raises:
        ArgumentError: An argument is invalid, or could have no effect.
    """
    if not (isinstance(probe, (str, os.PathLike, Tensor, ProbeBatch, type(None))) or (data and is_data(probe))):
        raise ArgumentError(
            f"probe: received a {type(probe).__name__}, expected a folder, a tensor (images, channels, H, W), a "
            f"ProbeBatch, {'a data set or its loader, ' if data else ''}or None to take images of the run's own data"
        )
    is_folder = isinstance(probe, (str, os.PathLike))
    received = "None" if probe is None else f"a {type(probe).__name__}"
    if masks is not None and not is_folder:
        raise ArgumentError(
            f"masks={os.fspath(masks)!r}: probe is {received}, expected the folder of images that the masks are "
            "for; a ProbeBatch takes masks of its own"
        )
    if image_size is not None and not is_folder:
        raise ArgumentError(
            f"image_size={image_size!r}: probe is {received}, whose images have a size already; expected a folder of "
            "images. Leave image_size out"
        )
    if num_images is not None and isinstance(probe, (Tensor, ProbeBatch)):
        raise ArgumentError(
            f"num_images={num_images!r}: probe is {received}, all of which is shown; expected a folder, or None. "
            "Leave num_images out, and pass a part of the images, such as probe[:4] of a tensor"
        )
    if num_images is not None and not _is_count(num_images):
        raise ArgumentError(f"num_images={num_images!r}: expected a whole number of at least 1")
    size: Any = IMAGE_SIZE if image_size is None else image_size
    size = tuple(size) if isinstance(size, list) else size
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2 or not all(map(_is_count, pair)):
        raise ArgumentError(f"image_size={image_size!r}: expected a number of pixels of at least 1, or (height, width)")
    return num_images or NUM_IMAGES, size


def check_heads(heads: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the heads to draw, None for all; whether the model has them is checked once its layers are known."""
    if heads is None:
        return None
    numbers = isinstance(heads, (list, tuple)) and all(isinstance(h, int) and not isinstance(h, bool) for h in heads)
    if not numbers or not heads or min(heads) < 0 or len(set(heads)) < len(heads):
        raise ArgumentError(f"heads={heads!r}: expected a list of different head numbers from 0 on, or None for all")
    return tuple(heads)


def check_dirpath(dirpath: str | os.PathLike[str] | Literal[False] | None) -> Path | Literal[False] | None:
    """Return the archive's folder, None for one in the run's folder, or False for no archive."""
    if dirpath is None or dirpath is False:
        return dirpath
    if not isinstance(dirpath, (str, os.PathLike)) or os.fspath(dirpath) == "" or "://" in os.fspath(dirpath):
        raise ArgumentError(
            f"dirpath={dirpath!r}: expected a local folder, None for one in the run's folder, or False for no archive"
        )
    return Path(dirpath)


def import_forward(forward: Forward | str | None) -> Forward | None:
    """Return a function, imported if it is given as "package.module:function" or "package.module.function"."""
    if forward is None or callable(forward):
        return forward
    if not isinstance(forward, str):
        raise ArgumentError(f"forward: received a {type(forward).__name__}, expected a function or its import path")
    module, separator, name = forward.rpartition(":" if ":" in forward else ".")
    problem = "that is no import path"
    if separator and module and name:
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if callable(found):
                return found  # type: ignore[no-any-return]
            problem = f"that is a {type(found).__name__}"
    raise ArgumentError(
        f'forward={forward!r}: {problem}; expected a function of (model, images), as "package.module:function"'
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
