"""Devices and image sizes for a model: a GPU as long as its memory lasts, whole patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import nn

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.observe.isolation import isolated_forward, model_device_dtype
from attn_monitor.commands.support.results import notify
from attn_monitor.distributed import is_out_of_memory
from attn_monitor.errors import ForwardError, ProbeError, text_of
from attn_monitor.probe.image_folder import check_size, own_size
from attn_monitor.probe.options import IMAGE_SIZE
from attn_monitor.probe.sizes import sizes_in

Result = TypeVar("Result")


class DeviceError(ValueError):
    """The device is not there, or has too little memory."""


def choose_device(name: str | None) -> torch.device:
    """Return the named device, by default a GPU if there is one; `DeviceError` if it cannot be used here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # PyTorch was built without it, or knows no such name
        unknown = "Expected one of" in str(error)
        reason = "PyTorch knows no such device" if unknown else str(error).strip().splitlines()[0].rstrip(".")
        raise DeviceError(f"device={name!r}: {reason}. Expected one such as cpu or cuda:0 that is there") from error


def with_memory_for(work: Callable[[], Result], model: nn.Module) -> Result:
    """Run ``work``, again on the CPU where the memory of the model's device is too small even for one image.

    ``work`` takes fewer images at a time by itself. The model then stays on the CPU, with a note on stderr.
    """
    device = model_device_dtype(model)[0]
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if device.type == "cpu":
            raise DeviceError("memory ran out on the CPU, with one image at a time; pass a smaller --size") from error
    notify(f"memory ran out on {device}, even with one image at a time: going on, on the CPU")
    model.to("cpu")
    torch.cuda.empty_cache()
    return with_memory_for(work, model)


def move_to(device: torch.device, model: nn.Module) -> None:
    """Move the model to a device, or with a note on stderr to the CPU where it has no room there."""
    try:
        model.to(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        notify(f"the model has no room on {device}: going on, on the CPU")
        model.to("cpu")


@contextmanager
def naming_sizes(images: str | None = None) -> Iterator[None]:
    """Name the sizes that a command takes where a model fails on images, as it takes no ``forward=``.

    Args:
        images: The images, whose own sizes are named too; None where there are none.
    """
    try:
        yield
    except ForwardError as error:
        failed, _, remedy = str(error).partition(". Pass images of a size that the model takes")
        if not remedy:
            raise
        own = []
        for volume in (True, False):
            with suppress(Exception):  # whatever libraries raise on files that are no such images
                own += [] if images is None else [str(list(own_size(images, volume=volume)))]
        raise ForwardError(
            f"{failed}. Pass another --size: a number, [height, width], of clips and volumes [frames or slices, "
            "height, width], of spectrograms [time, frequency]" + f"; the first file has {' or '.join(own)}" * bool(own)
        ) from error


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Return (height, width) of a model's patches; None where images enter no convolution with stride = kernel."""
    sides = _patch(model)
    return (sides[0], sides[1]) if len(sides) == 2 else None


def _patch(model: nn.Module) -> tuple[int, ...]:
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    return () if first is None or first.kernel_size != first.stride else tuple(first.stride)


def fitting_size(model: nn.Module, size: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Return (height, width), or three of a volume, cropped to whole patches as DINO does, with a note on stderr.

    Without a size it is 224, or a size that the model's error names where it refuses that and takes the other.
    Raises ValueError where not even one patch would be left.
    """
    if size is None:
        size = _accepted_size(model) or IMAGE_SIZE
        if size != IMAGE_SIZE:
            notify(f"the model refuses images of {IMAGE_SIZE} pixels, and is run on images of {size} (see --size)")
    wanted, patch = check_size(size), _patch(model)
    fitting = wanted
    if len(patch) == len(wanted):
        fitting = tuple(length - length % side for length, side in zip(wanted, patch, strict=True))
        of_patch = " × ".join(map(str, patch))
        if 0 in fitting:
            raise ValueError(f"size={size}: expected at least one patch, {of_patch} pixels")
        if fitting != wanted:
            given, cropped = (" × ".join(map(str, sides)) for sides in (wanted, fitting))
            notify(f"size {given} is cropped to {cropped}, a multiple of the patch ({of_patch})")
    return fitting


def _accepted_size(model: nn.Module, side: int = IMAGE_SIZE) -> int | None:
    """Return ``side``, or another one that the error of a model names that refuses it, and that it takes; else None."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    sizes, refused = [side], False
    while sizes:
        size = sizes.pop(0)
        try:
            with isolated_forward(model):
                default_forward(model, _noise(model, channels, size))
        except Exception as error:  # whatever a model raises; without another size it is raised again where it is run
            sizes = sizes if refused else sizes_in(text_of(error), side)
            refused = True
        else:
            return size
    return None


def check_taken(model: nn.Module, images: torch.Tensor, source: str) -> None:
    """Raise `ProbeError` where a model refuses the size of images (B, C, H, W) and is known to take another."""
    side = images.shape[-1]
    if images.ndim != 4 or images.shape[-2] != side or (size := _accepted_size(model, side)) in (None, side):
        return
    raise ProbeError(
        f"{source}: its images have {side} × {side} pixels, and the model refuses these and takes {size} × {size}. "
        f"Pass a folder of images, which are read in {size} × {size}, or a model of {side} × {side} pixels, such as "
        f'"package.module:factory(img_size={side})"'
    )


def _noise(model: nn.Module, channels: int, size: int) -> torch.Tensor:
    device, dtype = model_device_dtype(model)
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
