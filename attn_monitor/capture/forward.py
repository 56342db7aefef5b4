"""Run a model's forward under the observer, isolated, with its failures named."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture.error_origin import is_monitor_error
from attn_monitor.capture.isolation import is_sharded as is_sharded
from attn_monitor.capture.isolation import isolated_forward
from attn_monitor.capture.observer import AttentionObserver, StopForward
from attn_monitor.errors import AttentionError, ForwardError, text_of

Forward = Callable[[nn.Module, Tensor], Any]


def default_forward(model: nn.Module, images: Tensor) -> Any:
    """``model(images)``; Hugging Face models are told to accept sizes other than their own."""
    scripted = isinstance(model, torch.jit.ScriptModule)  # without a Python signature
    if not scripted and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        return model(images, interpolate_pos_encoding=True)
    return model(images)


def check_materialised(model: nn.Module) -> None:
    """Refuse a model whose weights have no values yet."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedParameter):
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
    """One isolated forward under the observer; a failure of the model becomes a `ForwardError` that names the size.

    A mistake of this package is raised as it is.
    """
    try:
        with isolated_forward(model), observer.watch(watched):
            forward(model, images)
    except StopForward:
        pass
    except (AttentionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if observer.stopped:  # the model has caught `StopForward`, and failed by it; what was wanted is observed
            return
        if "DefaultCPUAllocator" in text_of(error):  # as type, the CPU's want of memory is any RuntimeError
            raise torch.OutOfMemoryError(text_of(error)) from error
        if observer.failure is not None:  # not to be told as the model's
            raise observer.failure from None
        if is_monitor_error(error):
            raise
        raise ForwardError(
            f"{type(model).__name__} failed on images {tuple(images.shape)} {images.dtype}: {_in_one_line(error)}. "
            "Pass images of a size that the model takes (a multiple of its patch size), or forward=lambda model, "
            "images: ... where it wants other arguments"
        ) from error
    if observer.failure is not None:
        raise observer.failure


def _in_one_line(error: Exception) -> str:
    """The type of an error, and the first and the last line of its text, which may be pages long; it is chained."""
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip(" .")]
    ends = dict.fromkeys((*lines[:1], *lines[-1:]))
    text = " … ".join(textwrap.shorten(line, 300, placeholder=" …") for line in ends).rstrip(". ")
    return type(error).__name__ + (f": {text}" if text else "")
