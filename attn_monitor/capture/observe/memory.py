"""Recognise a tensor's memory without keeping it alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Value = TypeVar("Value")


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


def fetched_once(fetch: Callable[[Tensor], Value]) -> Callable[[Tensor], Value]:
    """Keep what ``fetch`` reads from the device of the latest tensors, as all layers share masks and lengths."""
    kept: list[tuple[Memory, tuple[Any, ...], Value]] = []

    def fetched(tensor: Tensor) -> Value:
        if tensor.is_inference():  # nothing says whether it was written to since
            return fetch(tensor)
        facts = tensor.shape, tensor.stride(), tensor._version
        for memory, known, value in kept:
            if facts == known and memory.holds(tensor):
                return value
        value = fetch(tensor)
        kept[:] = [*kept[-3:], (Memory(tensor), facts, value)]
        return value

    return fetched


def place_of(tensor: Tensor) -> tuple[int, int] | None:
    """Return a key of where a tensor starts, (storage, offset), good while it lives; None if it has no memory."""
    storage = storage_of(tensor)
    return None if storage is None else (int(storage.cdata), int(tensor.storage_offset()))


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """Return a weak reference to the storage of a tensor; None where it has none, or an empty one."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor without storage, such as a sparse one
        return None
    return StorageWeakRef(storage) if storage.nbytes() else None
