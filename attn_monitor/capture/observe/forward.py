"""Run a model's forward under the observer, in isolation, and report its failures as `ForwardError`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.error_origin import is_monitor_error
from attn_monitor.capture.observe.isolation import is_sharded as is_sharded
from attn_monitor.capture.observe.isolation import isolated_forward
from attn_monitor.capture.observe.observer import AttentionObserver, StopForward
from attn_monitor.errors import AttentionError, ForwardError, text_of

Forward = Callable[[nn.Module, Tensor], Any]


def default_forward(model: nn.Module, images: Tensor) -> Any:
    """Call ``model(images)``, with interpolated position embeddings where a Hugging Face model supports them."""
    scripted = isinstance(model, torch.jit.ScriptModule)  # has no Python signature
    if not scripted and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        return model(images, interpolate_pos_encoding=True)
    return model(images)


def check_materialised(model: nn.Module) -> None:
    """Raise `ForwardError` if a parameter has no values here (meta device, lazy module, ZeRO stage 3)."""
    for name, parameter in model.named_parameters():
        # Not isinstance(…, UninitializedParameter): PyTorch 2.4 takes a DTensor for one.
        if parameter.is_meta or nn.parameter.is_lazy(parameter):
            raise ForwardError(
                f"{type(model).__name__} cannot run yet: its parameter {name!r} has no values (meta device, or a lazy "
                "module). Look at it after it has been materialised: Lightning does so in configure_model"
            )
        if hasattr(parameter, "ds_id") and not parameter.numel():
            raise ForwardError(
                f"{type(model).__name__} cannot run by itself: its parameter {name!r} is partitioned by DeepSpeed's "
                "ZeRO stage 3 (0 of its values are here), expected whole parameters. Train with stage 1 or 2, or with "
                "FSDP, whose parameters are gathered for the probe"
            )


def run_forward(
    model: nn.Module,
    images: Tensor,
    forward: Forward,
    observer: AttentionObserver,
    watched: Iterable[tuple[str, nn.Module]],
) -> None:
    """Run one isolated forward under the observer.

    Args:
        model: The model, left as it was found.
        images: (B, C, *size) on the model's device.
        forward: How to call the model.
        observer: Receives the attention operations.
        watched: (path, module) pairs inside which operations are observed.

    Raises:
        ForwardError: The model failed; the message gives the image size.
        torch.OutOfMemoryError: The model ran out of memory, on the CPU too.
        Exception: A bug of this package, unchanged.
    """
    try:
        with isolated_forward(model), observer.watch(watched):
            forward(model, images)
    except StopForward:
        pass
    except (AttentionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if observer.stopped:  # the model caught `StopForward` and failed later; the requested rows are complete
            return
        if "DefaultCPUAllocator" in text_of(error):  # a plain RuntimeError on the CPU
            raise torch.OutOfMemoryError(text_of(error)) from error
        if observer.failure is not None:  # not the model's failure
            raise observer.failure from None
        if is_monitor_error(error):
            raise
        given = forward.as_given(images) if hasattr(forward, "as_given") else images  # in the order that it takes
        failed = f"{type(model).__name__} failed on images {tuple(given.shape)} {images.dtype}: {in_one_line(error)}"
        failure = ForwardError(
            f"{failed}. Pass images of a size that the model takes (a multiple of its patch size), or "
            "forward=lambda model, images: ... where it wants other arguments"
        )
        failure.batch, failure.failed = len(images), failed
        raise failure from error
    if observer.failure is not None:
        raise observer.failure


def in_one_line(error: BaseException) -> str:
    """Return an error's type and the first and last line of its text; the whole error is chained."""
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip(" .")]
    ends = dict.fromkeys((*lines[:1], *lines[-1:]))
    text = " … ".join(textwrap.shorten(line, 300, placeholder=" …") for line in ends).rstrip(". ")
    return type(error).__name__ + (f": {text}" if text else "")
