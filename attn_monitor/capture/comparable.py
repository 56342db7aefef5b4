"""Stand for tensors and objects in a comparison, without keeping them alive."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@torch.no_grad()
def checksum_of(tensor: Tensor) -> Tensor:
    """Compute a checksum that depends on every element and its position."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    words = flat.view(_INTEGERS[flat.element_size()]).long()
    weights = torch.arange(1, len(words) + 1, device=words.device) * -7046029254386353131  # the golden ratio's 64 bits
    return (words * (weights ^ (weights >> 29))).sum()


@dataclass(slots=True)
class Checksum:
    """Hold the checksum of a tensor once it has been fetched."""

    value: int = 0

    def __hash__(self) -> int:
        return 0


class SameObject:
    """Refer to an object by identity without keeping it alive."""

    __slots__ = ("_id", "_ref")

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._ref: weakref.ref[Any] | None = weakref.ref(value)
        except TypeError:  # functions written in C, and objects with slots
            self._ref = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SameObject) or self._id != other._id or (self._ref is None) != (other._ref is None):
            return False
        return self._ref is None or other._ref is None or self._ref() is other._ref() is not None

    def __hash__(self) -> int:
        return self._id
