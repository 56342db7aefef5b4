"""Notice kernels that PyTorch's dispatcher does not see, by the memory to which no operation has written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from attn_monitor.capture.observe.kinds.kind import Operation
from attn_monitor.capture.observe.memory import storage_of

aten = torch.ops.aten
_ALLOCATE = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class UnwrittenMemory:
    """Follow allocated memory until an operation writes to it or reads it.

    Triton, CuTe and pybind kernels are launched on tensors that Python has allocated. A dispatched operation that reads
    such a tensor, to which none has written, shows that a kernel was launched in between.

    Attributes:
        kernels: Paths of the modules that allocated memory to which an unseen kernel has written, in order.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, None] = {}
        self._unwritten: dict[int, tuple[StorageWeakRef, str]] = {}

    def allocated(self, operation: Operation, out: Any, path: str) -> None:
        """Take note of an operation's result if it is memory to be filled."""
        memory = storage_of(out) if operation.func in _ALLOCATE and isinstance(out, Tensor) else None
        if memory is not None:
            self._unwritten[memory.cdata] = memory, path

    def used(self, operation: Operation) -> None:
        """Take note of what an operation is about to write to and to read."""
        if not self._unwritten or operation.func in _ALLOCATE:
            return
        self._unwritten = {cdata: known for cdata, known in self._unwritten.items() if not known[0].expired()}
        returns_views = any(r.alias_info is not None and not r.alias_info.is_write for r in _returns(operation.func))
        foreign = getattr(operation.func, "namespace", "") != "aten"  # its schema may leave out what it writes to
        for name, argument in operation.named.items():
            tensors = argument if isinstance(argument, (list, tuple)) else [argument]
            for memory in [storage_of(t) for t in tensors if isinstance(t, Tensor)]:
                known = None if memory is None else self._unwritten.get(memory.cdata)
                if known is None or returns_views:
                    continue
                del self._unwritten[known[0].cdata]
                if name not in operation.written and not foreign:
                    self.kernels[known[1]] = None

    def written(self, tensor: Tensor) -> None:
        """Take note of what a kernel has written that was recognised otherwise."""
        if (memory := storage_of(tensor)) is not None:
            self._unwritten.pop(memory.cdata, None)


def _returns(func: Any) -> list[Any]:
    schema = getattr(func, "_schema", None)
    return [] if schema is None else list(schema.returns)
