"""Ask a model how many channels its images have, and in which order it takes their dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.isolation import model_device_dtype
from attn_monitor.capture.other_shapes import runs
from attn_monitor.image_axes import ImageAxes, named_axes

_MOST = 16  # channels to try where no convolution names a number


def image_channels(model: nn.Module, size: Sequence[int] = (224, 224)) -> tuple[int, str]:
    """Return how many channels a model takes, and the order of an image's dimensions, such as "chw" or "tchw".

    The number is that of its first convolution, 3, or the least with which it runs. Channels come first, behind the
    frames of clips, or are left out of spectrograms, as far as the model runs so.

    Args:
        model: The model, left as it was found.
        size: Size of the images to run it on; where it takes none of that size, the first guess is returned.
    """
    guesses: list[int] = list(dict.fromkeys([first_channels(model) or 3, 3, *range(1, _MOST + 1)]))
    device, dtype = model_device_dtype(model)
    for channels in guesses:
        noise = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0), device="cpu")
        for axes in _orders(channels, size):
            if runs(model, axes.as_given(noise).to(device, dtype)):
                return channels, "".join(axes.names)
    return guesses[0], "".join(next(_orders(guesses[0], size)).names)


def _orders(channels: int, size: Sequence[int]) -> Iterator[ImageAxes]:
    yield named_axes((channels, *size), 0)
    if len(size) == 3:
        yield named_axes((size[0], channels, *size[1:]), 1)
    elif channels == 1:
        yield named_axes(size, None)


def first_channels(model: nn.Module) -> int | None:
    """Return the channels of a model's first convolution; None without one."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    return None if first is None else int(first.in_channels)


def channels_that_run(model: nn.Module, images: Tensor) -> str:
    """Return a sentence that names the number of channels with which a model runs, and how to pass these.

    Args:
        model: The model, left as it was found.
        images: (B, C, H, W) on which the model fails, on its device and in its dtype.

    Returns:
        The sentence, empty where it runs with no other number.
    """
    given, (channels, _) = images.shape[1], image_channels(model, images.shape[2:])
    if channels == given or not runs(model, images[:, :1].expand(-1, channels, -1, -1)):
        return ""
    way = f"images of {channels} channels, or build the model for {given}"
    if given == 1:
        way = f"images.expand(-1, {channels}, -1, -1)"
    elif channels < given:
        way = f"those that it was made for, such as images[:, {list(range(channels))}], or build it for {given}"
    return f"It does run on {channels} channel{'s' * (channels > 1)}, and these images have {given}: pass {way}"
