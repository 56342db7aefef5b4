"""Define the duties of a kind of attention: recognise a call, read rows of it, and be answered in its place.

`attn_monitor.capture.kinds` lists the kinds. Observers loop over that list, so a new kind is one file and one entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.attention_rows import AttentionSource, CallingConvention, Query
from attn_monitor.capture.checked_rows import CheckedRows
from attn_monitor.capture.error_origin import errors_from
from attn_monitor.capture.kinds.attention_product import AttentionProduct
from attn_monitor.capture.observation import Observation, ReadObservation
from attn_monitor.capture.tolerance import tolerance


@dataclass(frozen=True)
class Operation:
    """Hold an operation that the model has dispatched, and its arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @errors_from("model")
    def run(self) -> Any:
        """Run the operation."""
        return self.func(*self.args, **self.kwargs)

    @errors_from("model")
    def run_in_parts(self) -> Any:
        """Run the operations of a composite operation; return NotImplemented for a primitive one."""
        if not isinstance(self.func, torch._ops.OpOverload):
            return NotImplemented
        return self.func.decompose(*self.args, **self.kwargs)


@dataclass
class ForwardState:
    """Hold what a kind may know of the forward in which its operations run.

    Attributes:
        images: Number of images in the batch.
        queries: Every query that may be read.
        logits: Whether the largest score of each query is wanted, which is known only before a softmax.
        modules: Paths of the running modules, the innermost last.
        products: Number of batched products so far.
    """

    images: int
    queries: Collection[Query] = ()
    logits: bool = False
    modules: list[str] = field(default_factory=list)
    products: int = 0

    @property
    def path(self) -> str:
        """Return the path of the innermost running module."""
        return self.modules[-1]


class AttentionCall(ABC):
    """Represent an attention that has just run; its operands and its result are still those of the model."""

    paths: tuple[str, ...] = ()
    """Paths of other modules in which a part of it ran."""

    @abstractmethod
    def read(self, query: Query, *, verify: bool, convention: CallingConvention | None) -> Observation:
        """Read the row of one query, or the mean over several.

        Args:
            query: The query.
            verify: Compare row·V with the result.
            convention: That of a third-party operation, if it is known already.
        """

    @abstractmethod
    def product(self, convention: CallingConvention | None) -> AttentionProduct:
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

    def forget(self) -> None:  # noqa: B027 - most kinds keep nothing
        """Drop what was kept of the forward, which has ended."""


def unreadable(query: Query, queries: int, *tensors: Tensor) -> str:
    """Return why an operation on these tensors cannot be read; "" if it can."""
    for tensor in tensors:
        if tensor.is_complex():
            return "its weights are complex numbers, of which no map can be drawn"
        if is_foreign_type(tensor):
            return f"its tensors are {type(tensor).__name__}s (sharded over devices, or ragged), not plain tensors"
    if isinstance(query, int) and query >= queries:
        return f"it has {queries} queries, so no query {query}"
    return ""


def is_foreign_type(tensor: Tensor) -> bool:
    """Return whether a tensor is of a subclass whose operations may mean something else."""
    return type(tensor) not in (Tensor, torch.nn.Parameter)


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
