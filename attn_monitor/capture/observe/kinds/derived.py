"""Follow what a forward computes from its softmaxes, such as their copies, masks and mixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from attn_monitor.capture.observe.memory import storage_of


class Derived:
    """Remember the memory of tensors and of all that was computed from them, without keeping any alive."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps its key from being used again

    def add(self, tensor: Tensor) -> None:
        """Remember a tensor."""
        if (storage := storage_of(tensor)) is not None:
            self._storages[storage.cdata] = storage

    def see(self, given: Iterable[Any], out: Any) -> None:
        """Remember an operation's results if any of its arguments is remembered."""
        if self._storages and any(map(self.holds, _tensors(given))):
            for tensor in _tensors([out]):
                self.add(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in remembered memory."""
        storage = storage_of(tensor)
        return storage is not None and storage.cdata in self._storages

    def forget(self) -> None:
        """Remember nothing."""
        self._storages = {}


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
