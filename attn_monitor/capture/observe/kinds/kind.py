"""Define the duties of a kind of attention: recognise a call, read its rows, hand over operands and result.

The list of kinds is in the folder's `__init__.py`; observers loop over it.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attn_monitor.capture.observe.attention_rows import AttentionSource, Query
from attn_monitor.capture.observe.checked_rows import CheckedRows
from attn_monitor.capture.observe.error_origin import errors_from
from attn_monitor.capture.observe.kinds.attention_product import AttentionProduct
from attn_monitor.capture.observe.observation import Observation, ReadObservation
from attn_monitor.capture.observe.parameter_writes import written_arguments
from attn_monitor.capture.observe.tolerance import tolerance


@dataclass(frozen=True)
class Operation:
    """Hold an operation that the model has dispatched, or a `torch.autograd.Function`, and its arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @errors_from("model")
    def run(self) -> Any:
        """Run the operation."""
        call = self.func.apply if isinstance(self.func, type) else self.func  # type: ignore[attr-defined]
        return call(*self.args, **self.kwargs)

    @errors_from("model")
    def run_in_parts(self) -> Any:
        """Run the operations of a composite operation; return NotImplemented for a primitive one."""
        if not isinstance(self.func, torch._ops.OpOverload):
            return NotImplemented
        return self.func.decompose(*self.args, **self.kwargs)

    @property
    def name(self) -> str:
        """Return the name of the operation, or the path of the class."""
        return f"{self.func.__module__}.{self.func.__qualname__}" if isinstance(self.func, type) else str(self.func)

    @property
    def named(self) -> dict[str, Any]:
        """Return the arguments by name; those without one are named by number."""
        return {**dict(zip(self._names, self.args, strict=False)), **self.kwargs}

    @property
    def written(self) -> tuple[str, ...]:
        """Return the names of the arguments that the operation writes to."""
        return tuple(name for _, name in written_arguments(self.func))

    def with_arguments(self, named: Mapping[str, Any]) -> Operation:
        """Return the operation with other arguments of the same names."""
        args = tuple(named[name] for name in self._names[: len(self.args)])
        return Operation(self.func, args, {name: named[name] for name in self.kwargs})

    def with_copies(self, names: Collection[str]) -> Operation:
        """Return the operation with copies of the tensors among these arguments, also of those in lists."""
        copied = {n: tree_map_only(Tensor, torch.clone, a) if n in names else a for n, a in self.named.items()}
        return self.with_arguments(copied)

    @property
    def _names(self) -> tuple[str, ...]:
        known = _argument_names(self.func)
        return *known, *map(str, range(len(known), len(self.args)))


@functools.lru_cache(maxsize=256)
def _argument_names(func: Any) -> tuple[str, ...]:
    if hasattr(func, "_schema"):
        return tuple(a.name for a in func._schema.arguments)
    if not isinstance(func, type):
        return ()
    parameters = inspect.signature(func.forward).parameters.values()  # type: ignore[attr-defined]
    names = tuple(p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD)
    return names if receives_no_context(func) else names[1:]


def receives_no_context(function: Any) -> bool:
    """Return whether the forward of an autograd function takes the arguments of `apply` alone."""
    return function.setup_context is not torch.autograd.Function.setup_context


@dataclass
class ForwardState:
    """Hold what a kind may know of the forward in which its operations run.

    Attributes:
        images: Number of images in the batch.
        queries: Every query that may be read.
        logits: Whether the largest score of each query is wanted, which is known only before a softmax.
        modules: Paths of the running modules, the innermost last.
        products: Number of batched products so far.
        unknown: Names of operations from outside PyTorch that were taken for no attention.
    """

    images: int
    queries: Collection[Query] = ()
    logits: bool = False
    modules: list[str] = field(default_factory=list)
    products: int = 0
    unknown: set[str] = field(default_factory=set)

    @property
    def path(self) -> str:
        """Return the path of the innermost running module."""
        return self.modules[-1]


class AttentionCall(ABC):
    """Represent an attention that has just run; its operands and its result are still those of the model."""

    paths: tuple[str, ...] = ()
    """Paths of other modules in which a part of it ran."""

    @abstractmethod
    def read(self, query: Query, *, verify: bool) -> Observation:
        """Read the row of one query, or the mean over several; ``verify`` compares row·V with the result."""

    @abstractmethod
    def product(self) -> AttentionProduct:
        """Return the operands, and the result to be overwritten."""

    def returned(self, out: Any) -> Any:
        """Return what the operation returns to the model, made of the result as it is by now."""
        return out


class AttentionKind(ABC):
    """Recognise one kind of attention among the operations of a forward.

    Args:
        state: That of the forward, kept up to date by the observer.
    """

    def __init__(self, state: ForwardState) -> None:
        self.state = state

    @staticmethod
    @abstractmethod
    def concerns(func: Any) -> bool:
        """Return whether calls of an operation could be this kind of attention or a part of it."""

    @abstractmethod
    def run(self, operation: Operation) -> tuple[Any, AttentionCall | None]:
        """Run an operation that concerns this kind.

        Returns:
            The operation's result, and the attention if one is complete with it.
        """

    @property
    def follows_others(self) -> bool:
        """Return whether `on_other_operation` would do anything now."""
        return False

    def on_other_operation(self, operation: Operation, out: Any) -> None:  # noqa: B027 - most kinds need not know
        """Take note of an operation that concerns no kind."""

    def forget(self) -> None:  # noqa: B027 - most kinds keep nothing
        """Drop what was kept of the forward, which has ended."""


def unreadable(query: Query, queries: int, *tensors: Tensor) -> str:
    """Return why an operation on these tensors cannot be read; "" if it can."""
    for tensor in tensors:
        if tensor.is_complex():
            return "its weights are complex numbers, of which no map can be drawn"
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"it multiplies whole numbers ({kind}), as in quantised layers, and what scales them is not known"
        if is_foreign_type(tensor):
            return (
                f"its tensors are {type(tensor).__name__}s, which have operations of their own (as tensors that are "
                "sharded over devices, or ragged, have)"
            )
    if isinstance(query, int) and query >= queries:
        return f"it has {queries} queries, so no query {query}"
    return ""


def is_foreign_type(tensor: Tensor) -> bool:
    """Return whether a tensor is of a subclass with operations of its own, which may mean something else."""
    return type(tensor).__torch_dispatch__ is not _NO_DISPATCH


_NO_DISPATCH: Any = Tensor.__torch_dispatch__


def read_rows(
    source: AttentionSource, values: Tensor, output: Tensor | None, query: Query, shape: dict[str, Any]
) -> ReadObservation:
    """Read rows of an attention and compare each with its output.

    Args:
        source: The attention.
        values: (B, H, K, D).
        output: (B, H, Q, D); None to skip the comparison.
        query: The query to read.
        shape: The fields ``op``, ``batch``, ``heads``, ``queries`` and ``keys`` of the observation.
    """
    checked = CheckedRows(source, values, output)
    rows = checked.read(query)
    allowed = 0.0 if output is None else tolerance(output.dtype, output.device)
    return ReadObservation(
        **shape, rows=rows, values=values, output=output, source=source, error=checked.error, tolerance=allowed
    )
