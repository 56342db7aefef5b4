"""Validate the arguments of a recording: the module and the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_monitor.errors import InputTypeError, ProbeError
from attn_monitor.image_axes import SHAPES


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
    """Return the images as a dense floating-point tensor of three to five dimensions.

    A list of images of one size is stacked, and a mapping such as a `BatchFeature` gives its only tensor of images.

    Raises:
        InputTypeError: The type, layout, dtype or number of dimensions is another.
        ProbeError: The tensor is empty or on the meta device.
    """
    images, expected = _unpacked(images), f"expected a floating-point tensor of images {SHAPES}"
    if not isinstance(images, Tensor):
        raise InputTypeError(f"images: received {_contents(images)}, {expected}{_as_a_tensor(images)}")
    if images.is_nested:
        raise InputTypeError(f"images: received a nested tensor, {expected}. Pass images of one size at a time")
    if images.layout != torch.strided:
        layout = str(images.layout).removeprefix("torch.")
        raise InputTypeError(f"images: received a tensor of layout {layout}, {expected}. Pass images.to_dense()")
    received = f"images: received {tuple(images.shape)} {images.dtype}"
    if not 3 <= images.ndim <= 5:
        one = ". Pass images[None] for a batch of one image" if images.ndim == 2 else ""
        raise InputTypeError(
            f"{received}, {expected}. Bring them into one of these shapes, and pass forward=lambda model, images: ... "
            f"where the model takes another{one}"
        )
    if not images.is_floating_point():
        raise InputTypeError(f"{received}, {expected}. Pass them as the model takes them, normalised: images.float()")
    if 0 in images.shape:
        raise ProbeError(f"{received}, which holds no pixel, {expected} of at least one")
    if images.is_meta:
        raise ProbeError(f"{received} on the meta device, which has no values. Pass images on the CPU or on a GPU")
    return images


def check_finite(images: Tensor) -> None:
    """Raise `ProbeError` if images (B, …) hold NaN or infinity; synchronises with the device."""
    finite = torch.isfinite(images).flatten(1).all(1)
    if not bool(finite.all()):
        broken = [i for i, whole in enumerate(finite.tolist()) if not whole]
        raise ProbeError(
            f"images: received NaN or infinity in image {', '.join(map(str, broken[:5]))}, expected finite pixels. "
            "Look at how these images are read and normalised"
        )


def _unpacked(images: Any) -> Any:
    """Return the tensor of a mapping or a list that holds one; anything else as it is."""
    if isinstance(images, Mapping):
        found = {name: x for name, x in images.items() if _is_like_images(x)}
        if len(found) == 1:
            return next(iter(found.values()))
        held = ", ".join(f"{name}: {_contents(x)}" for name, x in list(images.items())[:6])
        arrays = not found and any(isinstance(x, (list, np.ndarray)) for x in images.values())
        raise InputTypeError(
            f"images: received a {type(images).__name__} with {{{held}}}, expected one tensor of images in it. Pass it "
            'alone, such as batch["pixel_values"], and the rest by forward=lambda model, images: ...'
            + ('. An image processor makes tensors with return_tensors="pt"' if arrays else "")
        )
    if isinstance(images, (list, tuple)) and images and all(map(_is_like_images, images)):
        if len({x.shape for x in images}) > 1:
            shapes = ", ".join(str(tuple(x.shape)) for x in images[:4])
            raise InputTypeError(
                f"images: received a list of tensors of several shapes ({shapes}), expected images of one size, which "
                "can be stacked. Pass those of one size at a time"
            )
        return images[0] if len(images) == 1 and images[0].ndim > 3 else torch.stack([*images])
    return images


def _is_like_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def _as_a_tensor(value: Any) -> str:
    """Return how to make a tensor of what was passed for images; empty where nothing is known to."""
    items = value if isinstance(value, (list, tuple)) else [value]
    found = [f"images[{n}]" for n, item in enumerate(items) if _is_like_images(item)]
    if found:
        return f". Pass {' or '.join(found[:2])} alone, without what is beside it"
    if any(isinstance(item, np.ndarray) for item in items):
        return (
            ". Pass torch.from_numpy(images).float()"
            if items[0] is value
            else ". Pass torch.tensor(numpy.stack(images))"
        )
    if any(hasattr(item, "getbands") for item in items):  # of Pillow
        return (
            ". Pass torch.stack([torchvision.transforms.functional.to_tensor(image) for image in images]), normalised"
        )
    return ""


def _contents(value: Any) -> str:
    """Describe what was received, and what is in it."""
    if isinstance(value, (list, tuple)):
        kind = type(value).__name__
        return f"a {kind} of {', '.join(map(_contents, value[:4]))}" if value else f"an empty {kind}"
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return f"a NumPy array {value.shape}" if isinstance(value, np.ndarray) else _kind(value)


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
