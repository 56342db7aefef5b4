"""Validate the arguments of a recording: the module and the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.errors import InputTypeError, ProbeError


def check_model(model: Any) -> nn.Module:
    """Return the module without a ``torch.compile`` wrapper; raise `InputTypeError` if it is no module."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"model: received {_kind(model)}, expected a torch.nn.Module. Pass the module itself, and "
            "forward=lambda model, images: ... if it is to be called in another way"
        )
    return model


def check_images(images: Any) -> Tensor:
    """Return the images if they are a dense floating-point tensor (B, C, H, W).

    Raises:
        InputTypeError: The type, layout, dtype or number of dimensions is another.
        ProbeError: The tensor is empty or on the meta device.
    """
    expected = "expected a floating-point tensor (batch, channels, height, width)"
    if not isinstance(images, Tensor):
        raise InputTypeError(f"images: received {_kind(images)}, {expected}")
    if images.is_nested:
        raise InputTypeError(f"images: received a nested tensor, {expected}. Pass images of one size at a time")
    if images.layout != torch.strided:
        layout = str(images.layout).removeprefix("torch.")
        raise InputTypeError(f"images: received a tensor of layout {layout}, {expected}. Pass images.to_dense()")
    received = f"images: received {tuple(images.shape)} {images.dtype}"
    if images.ndim != 4 or not images.is_floating_point():
        raise InputTypeError(f"{received}, {expected}")
    if 0 in images.shape:
        raise ProbeError(f"{received}, which holds no pixel, {expected} of at least one")
    if images.is_meta:
        raise ProbeError(f"{received} on the meta device, which has no values. Pass images on the CPU or on a GPU")
    return images


def check_finite(images: Tensor) -> None:
    """Raise `ProbeError` if images (B, C, H, W) hold NaN or infinity; synchronises with the device."""
    finite = torch.isfinite(images).flatten(1).all(1)
    if not bool(finite.all()):
        broken = [i for i, whole in enumerate(finite.tolist()) if not whole]
        raise ProbeError(
            f"images: received NaN or infinity in image {', '.join(map(str, broken[:5]))}, expected finite pixels. "
            "Look at how these images are read and normalised"
        )


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
