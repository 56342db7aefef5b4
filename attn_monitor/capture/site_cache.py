"""What each model was found to have, kept for as long as the model lives."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attn_monitor.capture.forward import Forward
from attn_monitor.capture.isolation import all_modules
from attn_monitor.capture.site_discovery import discover
from attn_monitor.capture.sites import Site


class Conditions(NamedTuple):
    """Under which a model's sites stay the same."""

    image_shape: tuple[int, ...]  # (C, H, W)
    dtype: torch.dtype
    device: torch.device
    structure: int

    @classmethod
    def of(cls, images: Tensor, structure: int) -> Conditions:
        """Of images as the model takes them, and the model's `structure_of`."""
        return cls(tuple(images.shape[1:]), images.dtype, images.device, structure)


def structure_of(model: nn.Module) -> int:
    """Changes when a submodule is replaced, added, removed, renamed, or given another class (as FSDP does)."""
    return hash(tuple((id(module), type(module), *module._modules.keys()) for module in all_modules(model)))


@dataclass(frozen=True)
class _Entry:
    conditions: Conditions
    forward: Callable[[], object]
    sites: tuple[Site, ...]


_CACHE: weakref.WeakKeyDictionary[nn.Module, list[_Entry]] = weakref.WeakKeyDictionary()
_SIZE = 8  # entries a model: image sizes come and go


def sites_of(model: nn.Module, images: Tensor, forward: Forward, conditions: Conditions) -> tuple[Site, ...]:
    """Every attention site of the model, discovered once for the same conditions and forward."""
    entries, identity = _CACHE.setdefault(model, []), _identity(forward)
    for entry in entries:
        if entry.conditions == conditions and entry.forward() is identity():
            return entry.sites
    sites = discover(model, images, forward)
    entries.append(_Entry(conditions, identity, sites))
    del entries[:-_SIZE]
    return sites


def forget(model: nn.Module) -> None:
    """Discover the model's sites anew the next time."""
    _CACHE.pop(model, None)


def _identity(forward: Forward) -> Callable[[], object]:
    """What tells a forward from others without keeping it alive: the code, where nothing else is part of it."""
    if isinstance(forward, types.FunctionType) and not (forward.__closure__ or forward.__defaults__):
        code = forward.__code__
        return lambda: code
    try:
        return weakref.WeakMethod(forward) if isinstance(forward, types.MethodType) else weakref.ref(forward)
    except TypeError:  # an object without weak references equals no other, not even itself the next time
        return object
