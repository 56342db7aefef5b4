"""How many bytes of tensors are alive at once while something runs, counted and not measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations make while ``while_true`` holds, each until it is freed.

    ``peak`` is the largest sum of their bytes after any operation. What was there before (weights, images) is not
    counted, and neither is what an operation takes for itself while it runs. ``peak_apart`` is that of tensors that
    `count_apart` was given, which are no part of ``peak``.
    """

    def __init__(self, while_true: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.peak = self.peak_apart = 0
        self._while_true = while_true
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._apart: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self._alive = _not_freed(self._alive)
        for storage in _storages(out) if self._while_true() else ():
            if storage._cdata not in known | self._apart.keys():
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out

    def count_apart(self, tensor: Tensor) -> None:
        """Count a tensor as one that is somewhere else."""
        self._apart = _not_freed(self._apart)
        storage = tensor.untyped_storage()
        self._alive.pop(storage._cdata, None)
        self._apart[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_apart = max(self.peak_apart, sum(size for _, size in self._apart.values()))


def _not_freed(storages: dict[int, tuple[StorageWeakRef, int]]) -> dict[int, tuple[StorageWeakRef, int]]:
    return {key: (ref, size) for key, (ref, size) in storages.items() if not ref.expired()}


def _storages(value: Any) -> list[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        return [value.untyped_storage()]
    if isinstance(value, dict):
        value = list(value.values())
    return [s for item in value for s in _storages(item)] if isinstance(value, (list, tuple)) else []
