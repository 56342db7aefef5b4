"""Recognise a tensor's memory without keeping it alive."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Memory:
    """Refer to the memory of a tensor.

    Tensors are compared by their storage and the offset in it, not by address: some devices have none, and `data_ptr`
    ends the process there.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._numel, self._offset, self._storage = tensor.numel(), tensor.storage_offset(), storage_of(tensor)

    def holds(self, tensor: Any) -> bool:
        """Return whether a tensor of any shape is exactly this memory, which has not been freed since."""
        if not isinstance(tensor, Tensor) or tensor.numel() != self._numel or not self.overlaps(tensor):
            return False
        return bool(tensor.storage_offset() == self._offset)

    def offset(self, tensor: Tensor) -> int:
        """Return the start of an overlapping tensor, in elements from the start of this memory."""
        return int(tensor.storage_offset() - self._offset)

    @property
    def is_freed(self) -> bool:
        """Return whether the memory has been freed."""
        return self._storage is None or self._storage.expired()

    def overlaps(self, tensor: Tensor) -> bool:
        """Return whether the tensor shares this storage, which has not been freed since."""
        if self._storage is None or self._storage.expired():
            return False
        other = storage_of(tensor)
        return other is not None and bool(other.cdata == self._storage.cdata)


def is_same(a: Any, b: Tensor) -> bool:
    """Return whether two tensors of any shape are exactly the same memory."""
    return Memory(b).holds(a)


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """Return a weak reference to the storage of a tensor; None where it has none, or an empty one."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor without storage, such as a sparse one
        return None
    return StorageWeakRef(storage) if storage.nbytes() else None
