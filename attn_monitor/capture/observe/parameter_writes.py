"""Restore parameters that a model's forward writes to, such as weights that it normalises, decays or clamps."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_WRITTEN: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
"""The ids of the parameters that each model writes to, known after one complete forward. If a new parameter reuses an
id, it is copied needlessly.
"""


def was_watched(model: nn.Module) -> bool:
    """Return whether a complete forward has been watched, so that the parameters the model writes to are known."""
    return model in _WRITTEN


@contextmanager
def parameters_restored(model: nn.Module, modules: Sequence[nn.Module], lost: Callable[[str], None]) -> Iterator[None]:
    """Restore values, storages and ``requires_grad`` of a model's parameters after the body.

    In the first forward, a parameter is copied just before an operation writes to it; later forwards copy those
    parameters beforehand.

    Args:
        model: The model.
        modules: Its modules, and others that it holds.
        lost: Called with the name of a parameter that is first written to in a later forward: its value is lost.
    """
    every = {id(p): p for m in modules for p in m._parameters.values() if p is not None}.values()
    plain = [p for p in every if p.layout is torch.strided and not p.is_meta and type(p.data) is Tensor]
    before = [(p.data, p.requires_grad, p._version) for p in plain]
    known, copies = _WRITTEN.get(model), _Copies([data for data, _, _ in before])
    for parameter in plain:
        if known and id(parameter) in known:
            copies.save(parameter.data)
    try:
        with _SaveBeforeWriting(copies) if known is None else nullcontext():
            yield
        known = _WRITTEN.setdefault(model, set())  # skipped if the forward failed or was left early
    finally:
        copies.restore()
        for parameter, (data, requires_grad, version) in zip(plain, before, strict=True):
            if _storage_id(parameter) != _storage_id(data):
                parameter.data = data
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            written = parameter._version != version
            copied = copies.has(data)
            if known is not None and (copied or written):
                known.add(id(parameter))
            if written and not copied:
                names = (name for name, p in model.named_parameters() if p is parameter)
                lost(f"parameter {next(names, 'of a module that it holds')}")


class _Copies:
    """Copy the storages of tensors on request."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._copies: dict[int, torch.UntypedStorage] = {}

    @functools.cached_property
    def _storages(self) -> dict[int, torch.UntypedStorage]:
        return {_storage_id(t): t.untyped_storage() for t in self._tensors}

    def save(self, tensor: Tensor) -> None:
        """Copy the storage of a tensor, once, if it is one of those given."""
        key = _storage_id(tensor)
        if key in self._storages and key not in self._copies:
            self._copies[key] = self._storages[key].clone()

    def has(self, tensor: Tensor) -> bool:
        """Return whether the storage of a tensor has been copied."""
        return bool(self._copies) and _storage_id(tensor) in self._copies

    def restore(self) -> None:
        """Write all copies back."""
        for key, copy in self._copies.items():
            if self._storages[key].nbytes() == copy.nbytes():
                self._storages[key].copy_(copy)


class _SaveBeforeWriting(TorchDispatchMode):
    """Copy a storage before the first operation that writes to it, also through a view or ``.data``."""

    supports_higher_order_operators = True

    def __init__(self, copies: _Copies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, name in written_arguments(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
                    self._copies.save(tensor)
        return func(*args, **kwargs)


@functools.lru_cache(maxsize=1024)
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return (position, name) of the arguments that an operation writes to, by its schema."""
    schema = getattr(func, "_schema", None)
    arguments = () if schema is None else enumerate(schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _storage_id(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity
