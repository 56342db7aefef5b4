"""Save and restore the state that a model holds outside its parameters and buffers.

`HeldState` walks from the attributes of every module and its class through lists, dicts, sets, tuples, plain objects,
methods and partials, and also visits modules that are not submodules. It copies containers (each shallowly), tensors,
NumPy arrays, C values and the states of random generators, and restores those that changed. `HeldState.restore` returns
the paths of state that it can only compare. Closures and hooks are skipped: users may observe every forward in them.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import random
import threading
import types
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.held_values import (
    CONTAINERS,
    at_a_glance,
    equal,
    generator_state,
    outward_state,
    refill,
    same_items,
    slots_of,
)

_LARGEST_COPIES = 2**26  # bytes of all copied tensors and arrays outside buffers; larger ones are compared only
_LARGEST_WALK = 50_000  # objects; the rest of a larger graph is not restored
_LONGEST = 1_000  # items of one container that are walked; all of them are restored

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LEAVES = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.FunctionType}
    | {torch.dtype, torch.device, torch.Size, nn.Parameter, np.dtype, slice, range, property, staticmethod, classmethod}
)
_LOCKS = frozenset({"_thread", "threading", "queue", "multiprocessing", "concurrent", "asyncio"})
# Objects of these packages hold no state of the model: trainers, loggers, locks, optimizers, and our own.
_FOREIGN = _LOCKS | {
    "torch",
    "lightning",
    "pytorch_lightning",
    "attn_monitor",
    "numpy",
    "logging",
    "io",
    "_io",
    "weakref",
}
# Objects of these packages (iterators, caches, files, queues) are compared by their visible state.
_OPAQUE = frozenset({"io", "_io", "functools", "itertools", "builtins", "queue", "_queue"})
_C_VALUES = (ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
# Tables of a module that a forward may change; their items are saved elsewhere, or are functions.
_OWN_TABLES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}) | {
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
}
_TABLES = frozenset(vars(nn.Module()))
_NOTHING: dict[Any, Any] = {}  # stands for every empty container
_Path = tuple[Any, ...]  # (path of the owner, name or key); formatted only for reports


class _Saved(NamedTuple):
    """Hold a value's path, a test whether it has changed, and a function that restores it (None if impossible)."""

    path: _Path
    changed: Callable[[], bool]
    restore: Callable[[], object] | None


class HeldState:
    """Save the state that the modules of one model hold at construction.

    Args:
        modules: The model's modules.
        thorough: Also compare state that cannot be restored (large arrays, iterators, caches, files, objects with a
            lock), which is too slow for every snapshot.

    Attributes:
        tensors: Tensors that are not registered as buffers, 64 MiB in total at most; the caller saves their values.
        modules: The given modules and others that they hold in lists or objects.
    """

    def __init__(self, modules: Sequence[nn.Module], *, thorough: bool = False) -> None:
        self.tensors: list[Tensor] = []
        self._bytes_left = _LARGEST_COPIES
        self._containers: list[tuple[Any, Any]] = []  # each with a copy of its items
        self._empty: list[Any] = []  # tables of modules, thousands of them
        self._saved: list[_Saved] = []
        self._thorough = thorough
        self.modules = list(modules)
        self._seen = {id(module) for module in modules}
        self._waiting: deque[tuple[_Path, Any]] = deque()
        for module in modules:
            self._save_module(module)
        while self._waiting and len(self._seen) < _LARGEST_WALK:
            self._visit(*self._waiting.popleft())
        for cls in dict.fromkeys(c for kind in {type(module) for module in self.modules} for c in kind.__mro__):
            if cls is not object and not _is_foreign(cls.__module__):
                self._save_class(cls)
        while self._waiting and len(self._seen) < _LARGEST_WALK:
            self._visit(*self._waiting.popleft())
        self._waiting.clear()

    def restore(self) -> list[str]:
        """Restore everything, and return the paths of state that has changed and cannot be restored."""
        for container, before in self._containers:
            if (container or before) and not same_items(container, before):
                refill(container, before)
        for table in filter(None, self._empty):
            refill(table, _NOTHING)
        lost = []
        for path, changed, restore in self._saved:
            if changed():
                if restore is None:
                    lost.append(_spelled(path))
                else:
                    restore()
        return lost

    def _later(self, path: _Path, value: Any) -> None:
        if type(value) not in _LEAVES and id(value) not in self._seen:
            self._waiting.append((path, value))

    def _visit(self, path: _Path, value: Any) -> None:
        """Save a value by its type, once, and queue what it holds."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, dict):
            self._save_dict(path, value)
        elif isinstance(value, (list, set, deque)):
            self._save_items(path, value)
        elif isinstance(value, (tuple, frozenset)):
            for index, item in enumerate(list(value)[:_LONGEST]):
                self._later((path, index), item)
        elif isinstance(value, Tensor):
            self._save_tensor(path, value)
        elif isinstance(value, np.ndarray):
            self._save_array(path, value)
        elif isinstance(value, _GENERATORS):
            get, put = generator_state(value)
            before = get()
            self._saved.append(_Saved(path, lambda: not equal(get(), before), lambda: put(before)))
        elif isinstance(value, nn.Module):
            for module in all_modules(value):
                if module is value or id(module) not in self._seen:
                    self._seen.add(id(module))
                    self.modules.append(module)
                    self._save_module(module)
        elif isinstance(value, types.MethodType):
            self._later(path, value.__self__)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._later(path, part)
        elif isinstance(value, threading.local):
            self._save_dict(path, vars(value))
        elif isinstance(value, _C_VALUES):
            self._save_c_value(path, value)
        elif hasattr(value, "get_obj") and type(value).__module__ == "multiprocessing.sharedctypes":
            self._save_c_value(path, value.get_obj())
        elif not isinstance(value, type):
            self._save_object(path, value)

    def _save_module(self, module: nn.Module) -> None:
        """Save a module's attributes; its tables, thousands of them and mostly empty, are copied without a walk."""
        attributes = vars(module)
        self._containers.append((attributes, attributes.copy()))
        for name in _OWN_TABLES & attributes.keys():
            table = attributes[name]
            if type(table) not in CONTAINERS:  # a ScriptModule's are views of C++ objects
                continue
            if table:
                self._containers.append((table, table.copy()))
            else:
                self._empty.append(table)
        for name, item in attributes.items():
            if name in _TABLES or type(item) in _LEAVES:
                continue
            if isinstance(item, (types.MethodType, functools.partial)) and hasattr(type(module), name):
                continue  # a user's wrapper of the module's own method
            self._later(((type(module).__name__,), name), item)

    def _save_dict(self, path: _Path, value: dict[Any, Any]) -> None:
        before = dict(value)  # not .copy(): a subclass may have another constructor
        self._containers.append((value, before))
        for key, item in before.items() if len(before) <= _LONGEST else itertools.islice(before.items(), _LONGEST):
            self._later((path, key), item)

    def _save_items(self, path: _Path, value: Any) -> None:
        before = list(value)
        self._containers.append((value, before))
        for index, item in enumerate(before[:_LONGEST]):
            self._later((path, index), item)

    def _save_tensor(self, path: _Path, value: Tensor) -> None:
        if type(value) is not Tensor or value.is_meta:
            return
        if self._fits(value.untyped_storage().nbytes() if value.layout is torch.strided else 0):
            self.tensors.append(value)
        elif not value.is_inference():
            version = value._version
            self._saved.append(_Saved(path, lambda: value._version != version, None))

    def _save_array(self, path: _Path, value: np.ndarray) -> None:
        if value.dtype.hasobject:
            items = value.copy()
            changed = lambda: not all(map(operator.is_, value.flat, items.flat))  # noqa: E731
            self._saved.append(_Saved(path, changed, lambda: np.copyto(value, items)))
            for index, item in enumerate(items.ravel()[:_LONGEST].tolist()):
                self._later((path, index), item)
            return
        if self._fits(value.nbytes):
            copy = value.copy()
            self._saved.append(_Saved(path, lambda: value.tobytes() != copy.tobytes(), lambda: np.copyto(value, copy)))
        elif self._thorough and value.flags.c_contiguous:
            before = zlib.crc32(value.data)
            self._saved.append(_Saved(path, lambda: zlib.crc32(value.data) != before, None))

    def _fits(self, size: int) -> bool:
        fits = size <= self._bytes_left
        self._bytes_left -= size if fits else 0
        return fits

    def _save_class(self, cls: type) -> None:
        """Save the attributes of a module's class, which a forward may use as counters."""
        before = dict(vars(cls))

        def restore() -> None:
            now = dict(vars(cls))
            for name in now.keys() - before.keys():
                delattr(cls, name)
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    setattr(cls, name, value)

        self._saved.append(_Saved((cls.__name__,), lambda: not same_items(dict(vars(cls)), before), restore))
        for name, value in before.items():
            if not name.startswith("__"):
                self._later(((cls.__name__,), name), value)

    def _save_c_value(self, path: _Path, value: Any) -> None:
        address, size = ctypes.addressof(value), ctypes.sizeof(value)
        before = ctypes.string_at(address, size)
        changed = lambda: ctypes.string_at(address, size) != before  # noqa: E731
        self._saved.append(_Saved(path, changed, lambda: ctypes.memmove(ctypes.addressof(value), before, size)))

    def _save_object(self, path: _Path, value: Any) -> None:
        """Save an object's attributes and slots; opaque objects, and ones that hold locks, are only compared."""
        package = type(value).__module__.partition(".")[0]
        attributes = getattr(value, "__dict__", None)
        slots = [s for c in type(value).__mro__ for s in slots_of(c) if hasattr(value, s)]
        held = {**(attributes or {}), **{s: getattr(value, s) for s in slots}}
        if package in _OPAQUE or (package not in _FOREIGN and not isinstance(attributes, dict) and not slots):
            if self._thorough and (before := outward_state(value)) is not None:
                self._saved.append(_Saved(path, lambda: outward_state(value) != before, None))
        elif package in _FOREIGN:
            return
        elif any(type(item).__module__.partition(".")[0] in _LOCKS for item in held.values()):
            # Another thread may change it meanwhile, so it is not restored.
            if self._thorough and isinstance(attributes, dict):
                seen = at_a_glance(attributes)
                self._saved.append(_Saved(path, lambda: at_a_glance(attributes) != seen, None))
        else:
            if isinstance(attributes, dict):
                self._save_dict(path, attributes)
            for slot in slots:
                self._save_slot((path, slot), value, slot)

    def _save_slot(self, path: _Path, owner: Any, name: str) -> None:
        before = getattr(owner, name)
        self._saved.append(
            _Saved(path, lambda: getattr(owner, name, None) is not before, lambda: setattr(owner, name, before))
        )
        self._later(path, before)


def _spelled(path: _Path) -> str:
    if len(path) == 1:
        return str(path[0])
    owner, name = path
    return f"{_spelled(owner)}.{name}" if isinstance(name, str) else f"{_spelled(owner)}[{name!r}]"


@functools.lru_cache(maxsize=1024)
def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] in _FOREIGN


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return every module once, in arbitrary order; much faster than the nested generators of `model.modules()`."""
    found, waiting = {id(model): model}, [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())
