"""Ask a model how many channels its images have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.observe.isolation import isolated_forward, model_device_dtype

_MOST = 16  # channels to try where no convolution names a number


def image_channels(model: nn.Module, size: Sequence[int] = (224, 224)) -> int:
    """Return with how many channels the model runs: the number of its first convolution, 3, or the least that it takes.

    Args:
        model: The model, left as it was found.
        size: Size of the images to run it on; where it takes none of that size, the first guess is returned.
    """
    guesses: list[int] = list(dict.fromkeys([first_channels(model) or 3, 3, *range(1, _MOST + 1)]))
    device, dtype = model_device_dtype(model)
    for channels in guesses:
        images = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0), device="cpu")
        try:
            with isolated_forward(model):
                default_forward(model, images.to(device, dtype))
        except Exception:  # whatever a model raises on images of other channels, or of another size
            continue
        return channels
    return guesses[0]


def first_channels(model: nn.Module) -> int | None:
    """Return the channels of a model's first convolution; None without one."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    return None if first is None else int(first.in_channels)
