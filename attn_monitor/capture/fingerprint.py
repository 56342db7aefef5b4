"""Fingerprint everything but trained weights that a model's token order may depend on, to detect changes.

The fingerprint covers buffers, integer parameters, plain attributes, hooks, methods and classes of every module, and
the code, arguments, closure and globals of the forward that calls it. Tensors are compared by value: DDP's broadcasts
change versions but no values, and an EMA that writes through ``.data`` does the reverse. Trained weights change with
every step and are excluded; `recheck_places` tests their effect by running the model.
"""

from __future__ import annotations

import functools
import logging
import types
import zlib
from collections.abc import Callable, Mapping, Set
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attn_monitor.capture.comparable import Checksum, SameObject, checksum_of
from attn_monitor.capture.observe.isolation import all_modules, are_sharded
from attn_monitor.capture.observe.memory import place_of

Key = tuple[Any, ...]
"""The location of an item, such as (number of the module, name of the attribute)."""


class Item(NamedTuple):
    """Hold one fingerprinted value: "code" that users change, a "number" (or several) that training may, or "other"."""

    kind: Literal["code", "number", "other"]
    value: Any


State = Mapping[Key, Item]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_TABLES = {*vars(nn.Module()), "_compiled_call_impl"}  # not attributes of the user's
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_EQUAL_BY_VALUE = frozenset({bool, int, str, type(None)})
_NUMBERS = (int, float, complex)
_PLAIN = (*_SCALARS, list, tuple, dict, Set, Tensor, np.ndarray, np.generic)
# Limits on time: values with more bytes or items are compared by address and length; objects within objects, and those
# reached through more functions, by identity.
_BYTES, _ITEMS, _STEPS = 2**20, 1000, 8


def state_of(model: nn.Module, forward: Callable[..., Any]) -> State:
    """Fingerprint a model and the forward that calls it, by location."""
    modules = all_modules(model)
    sharded = are_sharded(modules)
    reader = _Reader(sharded)
    for number, module in enumerate(modules):
        for name, tensor in module._buffers.items():
            reader.value((number, name), tensor)
        for name, parameter in module._parameters.items():
            if parameter is not None and not (parameter.is_floating_point() or parameter.is_complex()):
                reader.value((number, name), parameter)
        for table in _HOOKS:
            if hooks := getattr(module, table):
                reader.hooks((number, table), hooks)
        if not sharded:
            reader.attributes((number,), module)
    for base in {base for kind in {*map(type, modules)} for base in kind.__mro__} - {*nn.Module.__mro__}:
        for name, value in list(vars(base).items()):
            reader.member((base, name), value)
    for table in _GLOBAL_HOOKS:
        reader.hooks((table,), getattr(nn.modules.module, table))
    reader.anything(("forward",), forward)
    return reader.finished()


class _Reader:
    """Collect items, and fetch the checksums of tensors once per device at the end.

    Args:
        sharded: Skip attributes of hooks' objects, in which FSDP keeps its own state.
    """

    def __init__(self, sharded: bool) -> None:
        self._sharded = sharded
        self._items: dict[Key, Item] = {}
        self._sums: list[tuple[Checksum, Tensor]] = []
        self._open: set[int] = set()  # ids of values being read, against cycles
        self._objects: dict[int, Any] = {}  # results by id, for objects such as a configuration that all modules share
        self._numbers = True  # whether the current value contains only numbers

    def finished(self) -> State:
        """Fetch the checksums of tensors and return all items."""
        by_device: dict[torch.device, list[tuple[Checksum, Tensor]]] = {}
        for entry in self._sums:
            by_device.setdefault(entry[1].device, []).append(entry)
        for entries in by_device.values():
            values = torch.stack([tensor for _, tensor in entries]).tolist()
            for (one, _), value in zip(entries, values, strict=True):
                one.value = value
        return self._items

    def anything(self, key: Key, value: Any) -> None:
        """Read an attribute, or a value that a function can reach."""
        if type(value) in _SCALARS:
            self.value(key, value)
        elif isinstance(value, _FUNCTIONS):
            self._function(key, value)
        elif _is_object(value) and callable(value):
            self._object(key, value)
            self.anything((*key, "()"), type(value).__call__)
        else:
            self.value(key, value)

    def value(self, key: Key, value: Any) -> None:
        """Read a value, including the contents of containers and objects."""
        self._numbers = True
        seen = self._comparable_key(value, 4)
        self._items[key] = Item("number" if self._numbers else "other", seen)

    def attributes(self, key: Key, value: Any) -> None:
        """Read each attribute of an object as an item of its own."""
        own = vars(value)
        for name in own.keys() - _TABLES:
            value = own[name]
            kind = type(value)
            if kind in _EQUAL_BY_VALUE:  # most attributes: what `value` does, in a tenth of its time
                where = (*key, name)
                self._items[where] = Item("number" if kind is int else "other", (kind, value))
            else:
                self.anything((*key, name), value)

    def hooks(self, key: Key, table: Mapping[int, Any]) -> None:
        """Read hooks in order, without those of this package, which change nothing."""
        hooks = [hook for hook in list(table.values()) if not _is_ours(hook)]
        if hooks:  # as where there never were any
            self._items[key] = Item("other", len(hooks))
        for number, hook in enumerate(hooks):
            self.anything((*key, number), hook)

    def member(self, key: Key, value: Any) -> None:
        """Read a member of a class: a method or a plain value."""
        value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        value = value.fget if isinstance(value, property) else value
        if isinstance(value, _FUNCTIONS):
            self._function(key, value)
        elif isinstance(value, _PLAIN) and not key[-1].startswith("__"):
            self.value(key, value)

    def _object(self, key: Key, value: Any) -> None:
        self._items[key] = Item("other", SameObject(value) if isinstance(value, nn.Module) else type(value))
        known = id(value) in self._open or len(key) > _STEPS
        if not known and not _is_ours(value) and (not self._sharded or key[0] == "forward"):
            self._open.add(id(value))
            self.attributes(key, value)
            self._open.remove(id(value))

    def _function(self, key: Key, function: Any) -> None:
        """Read a function's code and default arguments, then each value that it can reach as an item of its own."""
        if id(function) in self._open or len(key) > _STEPS:
            self._items[key] = Item("other", SameObject(function))
            return
        self._open.add(id(function))
        if isinstance(function, functools.partial):
            self._arguments(key, {**dict(enumerate(function.args)), **function.keywords})
            self.anything((*key, "partial"), function.func)
        elif isinstance(function, types.MethodType):
            self._object((*key, "self"), function.__self__)
            self.anything((*key, "method"), function.__func__)
        else:
            self._items[key] = Item("code", function.__code__)
            if function.__defaults__ or function.__kwdefaults__:
                defaults = dict(enumerate(function.__defaults__ or ()))
                self._arguments(key, {**defaults, **(function.__kwdefaults__ or {})})
            if not _is_ours(function):
                self._reach(key, function)
        self._open.remove(id(function))

    def _arguments(self, key: Key, arguments: Mapping[Any, Any]) -> None:
        for name, value in arguments.items():
            if isinstance(value, _SCALARS):  # constants count as code
                where = (*key, name)
                self._items[where] = Item("code", self._comparable_key(value, 0))
            else:
                self.anything((*key, name), value)

    def _reach(self, key: Key, function: types.FunctionType) -> None:
        of_user = key[0] == "forward"
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            if isinstance(content, nn.Module) and of_user:
                self._object((*key, name), content)
            else:
                self.anything((*key, name), content)
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if value is None or isinstance(value, (types.ModuleType, type)):
                continue  # most names
            where = (*key, "global", name)
            if isinstance(value, types.FunctionType):
                self._items[where] = Item("code", value.__code__)
            elif isinstance(value, _PLAIN) or (of_user and _is_object(value)):
                self.value(where, value)

    def _comparable_key(self, value: Any, budget: int) -> Any:
        """Return a key to compare a value by, equal if the value is equal."""
        kind = type(value)
        if kind in _SCALARS:
            self._numbers &= kind in _NUMBERS
            return kind, repr(value) if kind is float or kind is complex else value  # the repr of NaN equals itself
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject and value.nbytes <= _BYTES:
            self._numbers &= value.dtype.kind == "f" or value.size == 1
            return value.dtype.str, value.shape, zlib.crc32(np.ascontiguousarray(value).tobytes())
        container = isinstance(value, (list, tuple, dict, Set))
        if not container and id(value) in self._objects and budget >= 3:
            self._numbers = False
            return self._objects[id(value)]
        cost = 1 if container else 3 if _is_object(value) else budget + 1
        if cost <= budget and id(value) not in self._open:
            self._open.add(id(value))
            inner = self._inside(value, budget - cost)
            self._open.remove(id(value))
            if not container:
                self._objects[id(value)] = kind, inner
            return kind, inner
        self._numbers = False
        return (kind, len(value)) if container else SameObject(value)

    def _inside(self, value: Any, budget: int) -> Any:
        if not isinstance(value, (list, tuple, dict, Set)):
            self._numbers = False
            value = vars(value)
        if len(value) > _ITEMS:
            self._numbers = False
            return len(value)
        if isinstance(value, Set):
            return frozenset(self._comparable_key(item, budget) for item in list(value))
        if isinstance(value, dict):
            return tuple(
                (self._comparable_key(k, budget), self._comparable_key(v, budget)) for k, v in list(value.items())
            )
        return tuple(self._comparable_key(item, budget) for item in list(value))

    def _tensor(self, tensor: Tensor) -> Any:
        self._numbers &= tensor.is_floating_point() or tensor.is_complex() or tensor.numel() == 1
        facts = (type(tensor), tensor.shape, tensor.dtype)
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            return facts
        storage = tensor.untyped_storage()
        if tensor.nbytes > _BYTES:
            return *facts, place_of(tensor), None if tensor.is_inference() else tensor._version
        if tensor.is_quantized or not tensor.nbytes or not storage.nbytes():  # FSDP frees what it has sharded
            return facts
        self._sums.append((Checksum(), checksum_of(tensor)))
        return *facts, self._sums[-1][0]


def _is_object(value: Any) -> bool:
    """Return whether to read a value's attributes: it has some, and is not from PyTorch, Python or this package."""
    kept = isinstance(value, (type, types.ModuleType, types.FunctionType, logging.Logger, nn.Module))
    of_torch = type(value).__module__.partition(".")[0] == "torch"
    return hasattr(value, "__dict__") and not kept and not of_torch and not _is_ours(value)


def _is_ours(value: Any) -> bool:
    function = value.__func__ if isinstance(value, types.MethodType) else value
    module = function.__module__ if isinstance(function, types.FunctionType) else type(function).__module__
    return str(module).partition(".")[0] == __name__.partition(".")[0]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes in a function and in its inner functions."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))
