"""Observe the images that enter a backbone during a step, and infer how the step prepares its batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from attn_monitor.capture.observe.isolation import all_modules, is_isolated
from attn_monitor.image_axes import likely_axes
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.train.batch_images import MAX_CHANNELS, find_images
from attn_monitor.train.weak_hooks import add_hook, compiles

FORWARDS = 8  # forwards of the models to look at in a batch
NO_SPREAD = 1e-12
ALIKE = 5.0  # largest ratio between the spreads of a channel in two sets of images that were prepared alike


class BackboneInputs:
    """Keep the first images of a batch, and those that enter some models until `stop`.

    Hooks on the models observe one batch. If anything is compiled no hook is set, as it would cause a recompilation,
    and ``can_see`` is False.

    Args:
        models: the backbones to observe.
        batch: what the step receives, in any container.
        count: how many images to keep of each tensor.
        root: the module around all models, if there is one.
    """

    def __init__(self, models: Iterable[nn.Module], batch: Any, count: int, root: nn.Module | None = None) -> None:
        models = list(dict.fromkeys(models))
        around = [*models] if root is None else [root, *models]
        self.can_see = bool(models) and not compiles(m for model in around for m in all_modules(model))
        self.given = [_first(t, count) for t in pytree.tree_leaves(batch) if self.can_see and _may_be_images(t)]
        self.entered: list[Tensor] = []
        self.error: Exception | None = None  # raised in a hook, which must not end the step
        self._count = count
        hooked = models if self.can_see else []
        self._handles = [add_hook(m.register_forward_pre_hook, self._enters, with_kwargs=True) for m in hooked]

    def stop(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _enters(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if is_isolated() or len(self.entered) >= FORWARDS:
            return
        images = find_images([*args, kwargs])
        if images is not None:
            self.entered.append(_first(images, self._count))


@dataclass(frozen=True)
class Preparation:
    """Map each channel from what a batch holds to what enters the model: images · scale + offset."""

    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def __str__(self) -> str:
        numbers = (", ".join(f"{v:.4g}" for v in values) for values in (self.scale, self.offset))
        return "times {}; plus {}".format(*numbers)

    @property
    def changes_nothing(self) -> bool:
        """Whether the model receives the batch unchanged."""
        return set(self.scale) == {1.0} and set(self.offset) == {0.0}

    def of(self, probe: ProbeBatch) -> ProbeBatch:
        """Return the probe as the model receives it; its mean and std change too, so that it looks the same."""
        images = probe.channels_first.double()
        shape = (1, -1, *(1 for _ in images.shape[2:]))
        scale, offset = (torch.tensor(v, dtype=torch.float64).view(shape) for v in (self.scale, self.offset))
        images = probe.image_axes.as_given((images * scale + offset).float())
        std = [s / a for s, a in zip(probe.std, self.scale, strict=True)]
        mean = [m - b * s for m, b, s in zip(probe.mean, self.offset, std, strict=True)]
        source = f"{probe.source}, and prepared as the step prepares a batch: {self}"
        return ProbeBatch(
            images, mean=mean, std=std, names=probe.names, caption=probe.caption, source=source, axes=probe.axes
        )


def find_preparation(given: Sequence[Tensor], entered: Sequence[Tensor]) -> Preparation | None:
    """Fit how a step prepares its batch, by least squares on that batch; None if no map per channel is exact."""
    pairs = [(before, after) for after in entered for tensor in given for before in _channels_first(tensor)]
    maps = [found for before, after in pairs if (found := _fit(before, after)) is not None]
    return next((m for m in maps if m.changes_nothing), maps[0] if maps else None)


def alike(images: Tensor, others: Tensor) -> bool:
    """Whether two sets of images may be prepared alike, by mean and spread of their channels.

    Constant channels are ignored.
    """
    if images.ndim != others.ndim or _channels(images).shape[1] != _channels(others).shape[1]:
        return False
    (mean, std), (mean_of_others, std_of_others) = (_statistics(i) for i in (images, others))
    larger, smaller = torch.maximum(std, std_of_others), torch.minimum(std, std_of_others)
    differ = (larger > ALIKE * smaller) | ((mean - mean_of_others).abs() > ALIKE * larger)
    tells = smaller > NO_SPREAD
    return not bool(tells.any() and differ[tells].all())


def is_nearer(images: Tensor, than: Tensor, others: Tensor) -> bool:
    """Whether ``images`` are nearer to ``others`` in mean and spread than ``than``."""
    mean, std = _statistics(others)

    def distance(of: Tensor) -> float:
        its_mean, its_std = _statistics(of)
        return float(((its_mean - mean) / std).abs().sum() + (its_std / std).log().abs().sum())

    return distance(images) < distance(than)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    of_channel = _channels(images).double().transpose(0, 1).flatten(1)
    return of_channel.mean(1), of_channel.std(1).clamp(min=NO_SPREAD)


def _channels(images: Tensor) -> Tensor:
    """Return images as (B, C, *size), as far as their sizes tell."""
    return likely_axes(images.shape).channels_first(images)


def _fit(before: Tensor, after: Tensor) -> Preparation | None:
    """Fit the map on the images that both tensors have."""
    count = min(len(before), len(after))
    before, after = before[:count], after[:count]
    if before.shape != after.shape:
        return None
    before, after = _channels(before), _channels(after)
    channels = before.shape[1]
    if torch.equal(before.to(after.dtype), after):
        return Preparation((1.0,) * channels, (0.0,) * channels)
    x, y = (images.double().transpose(0, 1).flatten(1) for images in (before, after))  # (channels, pixels)
    centred = x - x.mean(1, keepdim=True)
    spread = centred.square().sum(1)
    if not bool((spread > 0).all() and y.isfinite().all()):
        return None
    scale = (centred * y).sum(1) / spread
    offset = y.mean(1) - scale * x.mean(1)
    apart = (y - (scale[:, None] * x + offset[:, None])).abs().amax(1)
    size = y.abs().amax(1) + (scale[:, None] * x).abs().amax(1) + offset.abs()
    if not bool((scale != 0).all() and (apart <= 4 * torch.finfo(after.dtype).eps * size).all()):
        return None
    return Preparation(tuple(scale.tolist()), tuple(offset.tolist()))


def _channels_first(images: Tensor) -> list[Tensor]:
    """Return the images as they are, and with the last axis as channels if it is short enough."""
    last = images.ndim == 4 and images.shape[3] <= MAX_CHANNELS
    return [images, images.permute(0, 3, 1, 2)] if last else [images]


def _may_be_images(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and 3 <= tensor.ndim <= 5 and tensor.numel() > 0 and not tensor.is_complex()


def _first(images: Tensor, count: int) -> Tensor:
    """Copy the first images to the CPU, as steps change batches in place."""
    return images.detach()[:count].as_subclass(Tensor).to("cpu", copy=True)


def prepared_probe(probe: ProbeBatch, inputs: BackboneInputs) -> ProbeBatch | None:
    """Prepare a probe of the run's own data as the step prepares its batch, if that is a known map per channel.

    Returns:
        The probe as the models receive it; None if they receive other images by an unknown preparation.
    """
    if not inputs.entered:
        return probe
    preparation = find_preparation(inputs.given, inputs.entered)
    entered = inputs.entered[0]
    if preparation is not None and len(preparation.scale) == len(probe.mean):
        if preparation.changes_nothing:
            return probe
        changed = preparation.of(probe)
        return changed if is_nearer(changed.images, probe.images, entered) else probe
    return probe if alike(probe.images, entered) else None
