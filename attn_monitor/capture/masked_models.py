"""Run models that drop, shuffle or mask patches (such as MAE) on all patches in order."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.observe.isolation import all_modules

RATIO = re.compile(r"mask(ing)?_ratio$")
MASK = re.compile(r"^((bool|patch|token)_)?mask(s|ed_pos|_pos|ed_positions?)?$")


def unmasked_forward(model: nn.Module, images: Tensor) -> Any:
    """Call the model with every ``mask_ratio`` at 0 and without shuffling."""
    with unmasked(model):
        return default_forward(model, images)


def empty_mask_forward(model: nn.Module, images: Tensor) -> Any:
    """Call the model with an empty mask (B, gh, gw), which iBOT and SimMIM require."""
    return model(images, **dict.fromkeys(_mask_arguments(model), _empty_mask(model, images)))


def empty_flat_mask_forward(model: nn.Module, images: Tensor) -> Any:
    """Call the model with an empty mask (B, gh · gw), which BEiT requires."""
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
        raise NotImplementedError(f"{type(model).__name__} has no convolution with the size of its patches")
    grid = [size // patch for size, patch in zip(images.shape[2:], patches, strict=True)]
    return torch.zeros(len(images), *grid, dtype=torch.bool, device=images.device)


def features_forward(model: nn.Module, images: Tensor) -> Any:
    """Call ``model.forward_features(images)``, timm's name for the part before the head, without masks or shuffling."""
    features: Callable[[Tensor], Any] | None = getattr(model, "forward_features", None)
    if features is None:
        raise NotImplementedError(f"{type(model).__name__} has no forward_features")
    with unmasked(model):
        return features(images)


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """Run the body without random masks and shuffles.

    ``mask_ratio`` is set to 0 in the forward's arguments, the modules' attributes and their ``config``. Two-dimensional
    ``torch.rand``, which masks and shuffles sort, returns ascending numbers. Any other random order is part of what the
    model computes, and such a model is unsupported.
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
    """Return (attributes of a module or configuration, name) for every mask ratio, without duplicates."""
    owners = {id(o): o for m in all_modules(model) for o in (m, getattr(m, "config", None)) if hasattr(o, "__dict__")}
    spaces = [vars(owner) for owner in owners.values()]
    return [(s, name) for s in spaces for name, v in s.items() if RATIO.search(name) and isinstance(v, (int, float))]


class _InOrder(TorchFunctionMode):
    """Make two-dimensional ``torch.rand`` return ascending numbers, so that sorting it gives the identity."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.rand, torch.rand_like) and out.ndim == 2:
            ascending = torch.linspace(0, 1, out.shape[1] + 1, device=out.device, dtype=out.dtype)[:-1]
            return ascending.expand_as(out)
        return out
