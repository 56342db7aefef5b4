"""Tensors by name, which are read from their file when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_monitor.errors import CheckpointError


@dataclass(frozen=True)
class Weights:
    """Names and shapes of what a file holds, and a function that reads one tensor.

    ``skipped`` are the classes of other objects in it, which were not made; ``stored`` is all that `torch.save` was
    given, beside these.
    """

    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]
    skipped: tuple[str, ...] = ()
    stored: Any = None

    @staticmethod
    def of(tensors: Mapping[str, Tensor], skipped: tuple[str, ...] = (), stored: Any = None) -> Weights:
        """Those that are in memory, or mapped into it."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return Weights(shapes, lambda name: not_larger_than_stored(name, tensors[name]), skipped, stored)


def not_larger_than_stored(name: str, tensor: Tensor) -> Tensor:
    """The tensor, unless its strides repeat few bytes often, so that a copy could fill the memory."""
    if tensor.layout == torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} is {tuple(tensor.shape)}, more than the bytes stored for it")
    return tensor
