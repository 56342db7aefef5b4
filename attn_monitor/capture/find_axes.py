"""Find in the model which dimension of images holds the channels.

Behind this module images are (B, C, *size), whatever order a model takes: clips as (B, C, T, H, W) or (B, T, C, H, W),
volumes, and spectrograms, which have no channels. No size tells which dimension holds them, so the model is asked: its
first convolution on the images takes as many channels as its weights have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.forward import Forward, run_forward
from attn_monitor.capture.observe.observer import AttentionObserver
from attn_monitor.capture.observe.patch_grids import with_frames
from attn_monitor.errors import AttentionError, InputTypeError
from attn_monitor.image_axes import SHAPES, ImageAxes, likely_axes, named_axes


def taking_channels_first(forward: Forward, axes: ImageAxes) -> Forward:
    """Return a forward that takes images (B, C, *size)."""
    return forward if axes.channel == 0 and not axes.groups else _Reordered(axes, forward)


@dataclass(frozen=True)
class _Reordered:
    """Call a model on images (B, C, *size) in the order that it takes."""

    axes: ImageAxes
    forward: Forward

    def __call__(self, model: nn.Module, images: Tensor) -> Any:
        return self.forward(model, self.as_given(images))

    def as_given(self, images: Tensor) -> Tensor:
        """Return images (B, C, *size) in the order that the model takes."""
        return self.axes.as_given(images)


def axes_of(model: nn.Module, images: Tensor, forwards: Sequence[Forward]) -> ImageAxes:
    """Find which dimension of images holds the channels, by the model's first convolution on them.

    Images of two axes and channels are (B, C, H, W), and nothing is run. For others, `likely_axes` decides where no
    convolution runs on the images.

    Args:
        model: The model, left as it was found.
        images: (B, …) in the model's dtype and on its device; one of them is run.
        forwards: The ways to call the model that may work, the first that does is used.

    Raises:
        AttentionError: The model fails on the images, however it is called.
        InputTypeError: Likewise, on images of three dimensions.
    """
    likely = likely_axes(images.shape)
    if images.ndim == 4:
        return likely
    problems: list[AttentionError] = []
    for forward in forwards:
        noise = torch.randn(images[:1].shape, generator=torch.Generator().manual_seed(0), device="cpu").to(images)
        observer = _ChannelObserver(likely, noise)
        try:
            run_forward(model, noise, forward, observer, model.named_modules())
        except AttentionError as error:
            problems.append(error)
            continue
        return observer.found or likely
    if images.ndim == 3:
        raise InputTypeError(
            f"images: received {tuple(images.shape)} {images.dtype}, expected a floating-point tensor of images "
            f"{SHAPES}. Pass images[None] if this is one image (channels, height, width). Taken as spectrograms or "
            f"signals, {problems[0]}"
        ) from problems[0]
    raise problems[0]


class _ChannelObserver(AttentionObserver):
    """Leave the forward at the first convolution that takes the images, and keep the axes that it shows."""

    def __init__(self, likely: ImageAxes, images: Tensor) -> None:
        super().__init__(likely.channels_first(images))
        self.given = images
        self.found: ImageAxes | None = None

    def _convolution(self, args: tuple[Any, ...], out: Tensor) -> None:
        x, sizes = args[0], tuple(self.given.shape[1:])
        alike = []
        for channel in (*range(len(sizes)), None):
            if (1 if channel is None else sizes[channel]) != x.shape[1]:
                continue
            axes = named_axes(sizes, channel)
            correlation = _correlation(x, axes.channels_first(self.given))
            alike += [] if correlation is None else [(correlation, axes)]
        if alike:
            self.found = max(alike, key=lambda one: one[0])[1]
            self._stop()


def _correlation(x: Tensor, images: Tensor) -> float | None:
    """Return the largest correlation of a convolution's input with images (B, C, *size), over all orders of axes.

    None where the input's shape is that of no order; frames may be in the batch.
    """
    rank = x.ndim - 2
    found = []
    for order in itertools.permutations(range(images.ndim - 2)):
        turned = images.permute(0, 1, *(2 + axis for axis in order))
        frames = turned.shape[2 : turned.ndim - rank]
        batch, same = len(images) * math.prod(frames), x.shape[2:] == turned.shape[2 + len(frames) :]
        if rank > len(order) or len(x) != batch or not same:
            continue
        own, other = (_standard(t) for t in (with_frames(x, (len(images), *frames)), turned))
        found.append(float((own * other).mean()))
    return max(found, default=None)


def _standard(x: Tensor) -> Tensor:
    """Standardise each channel of (B, C, *size), as preparation by channel does not change the result."""
    dims = (0, *range(2, x.ndim))
    x = x.float()
    return (x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True, correction=0).clamp_min(1e-12)
