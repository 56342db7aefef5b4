"""Models that leave patches out, shuffle or mask them (MAE and its kin): how to run them on all, in order."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attn_monitor.capture.forward import default_forward
from attn_monitor.capture.isolation import all_modules

RATIO = re.compile(r"mask(ing)?_ratio$")
MASK = re.compile(r"^((bool|patch|token)_)?mask(s|ed_pos|_pos|ed_positions?)?$")


def unmasked_forward(model: nn.Module, images: Tensor) -> Any:
    """The model's own forward with every ``mask_ratio`` at 0 and its shuffles in order."""
    with unmasked(model):
        return default_forward(model, images)


def empty_mask_forward(model: nn.Module, images: Tensor) -> Any:
    """The model's own forward with a mask (B, gh, gw) in which no patch is masked, as iBOT and SimMIM ask for one."""
    return model(images, **dict.fromkeys(_mask_arguments(model), _empty_mask(model, images)))


def empty_flat_mask_forward(model: nn.Module, images: Tensor) -> Any:
    """The same with a mask (B, gh · gw), as BEiT asks for one."""
    return model(images, **dict.fromkeys(_mask_arguments(model), _empty_mask(model, images).flatten(1)))


def _mask_arguments(model: nn.Module) -> list[str]:
    names = [name for name in inspect.signature(model.forward).parameters if MASK.search(name)]
    if not names:
        raise NotImplementedError(f"{type(model).__name__} takes no mask of patches")
    return names


def _empty_mask(model: nn.Module, images: Tensor) -> Tensor:
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    patches = next((c.kernel_size for c in convolutions if c.kernel_size == c.stride and max(c.kernel_size) > 1), None)
    if patches is None:
        raise NotImplementedError(f"{type(model).__name__} has no convolution that tells the size of its patches")
    grid = [size // patch for size, patch in zip(images.shape[2:], patches, strict=True)]
    return torch.zeros(len(images), *grid, dtype=torch.bool, device=images.device)


def features_forward(model: nn.Module, images: Tensor) -> Any:
    """``model.forward_features(images)``, as timm calls what comes before a head, without masks and shuffles."""
    features: Callable[[Tensor], Any] | None = getattr(model, "forward_features", None)
    if features is None:
        raise NotImplementedError(f"{type(model).__name__} has no forward_features")
    with unmasked(model):
        return features(images)


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """No patch is left out at random, and none changes places.

    Arguments of the forward and attributes of modules or of their ``config`` that are called ``mask_ratio`` are 0
    meanwhile; ``torch.rand`` of two dimensions, whose order is what masks and shuffles are made of, gives ascending
    numbers. Another random order is part of what the model computes, and such a model is refused.
    """
    with ExitStack() as stack:
        for attributes, name in _ratios(model):
            stack.callback(attributes.__setitem__, name, attributes[name])
            attributes[name] = 0.0
        arguments = [name for name in inspect.signature(model.forward).parameters if RATIO.search(name)]

        def without(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, **dict.fromkeys(arguments, 0.0)}

        if arguments:
            stack.enter_context(model.register_forward_pre_hook(without, with_kwargs=True))
        stack.enter_context(_InOrder())
        yield


def _ratios(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """(attributes of a module or a configuration, name) of every ratio; a shared configuration comes once."""
    owners = {id(o): o for m in all_modules(model) for o in (m, getattr(m, "config", None)) if hasattr(o, "__dict__")}
    spaces = [vars(owner) for owner in owners.values()]
    return [(s, name) for s in spaces for name, v in s.items() if RATIO.search(name) and isinstance(v, (int, float))]


class _InOrder(TorchFunctionMode):
    """Random orders are the identity while this is on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.rand, torch.rand_like) and out.ndim == 2:
            ascending = torch.linspace(0, 1, out.shape[1] + 1, device=out.device, dtype=out.dtype)[:-1]
            return ascending.expand_as(out)
        return out
