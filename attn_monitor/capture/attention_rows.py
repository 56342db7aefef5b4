"""Attention that has run, as something to read rows of: from q and k (fused), or from its softmax (explicit).

Neither ever builds a (queries, keys) matrix: one row is one row, and all rows pass by a few at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Query = int | Literal["mean"] | tuple[int, ...]
"""A token index, or an average: "mean" over all queries, a tuple over these, in ascending order."""

Folding = Literal["batch first", "heads first"]
"""Which of batch and heads comes first where they are one dimension: (B·H, …) or (H·B, …)."""


class CallingConvention(NamedTuple):
    """How an attention kernel from outside PyTorch takes its arguments and lays out its result."""

    packed_dim: int  # the dimension of length 3 that holds q, k and v; -1 where they are separate tensors
    tokens_first: bool  # (B, N, H, D), else (B, H, N, D)
    scale: float
    causal: bool
    heads_first_out: bool  # the result is (B, H, N, D), else (B, N, H, D)


_CHUNK = 64  # queries at a time when all are wanted: memory stays O(tokens)


class Chunk(NamedTuple):
    """A few rows of a matrix: those of ``queries``, (B, H, queries, K).

    ``largest_logits`` (B, H, queries) are the largest of each query's logits, what enters its softmax: scale · q·k +
    bias, without the keys that are masked; None where the scores are not known, or not asked for.
    """

    queries: Sequence[int]
    rows: Tensor
    largest_logits: Tensor | None


class AttentionSource(Protocol):
    """Attention that ran, of which any part of the (B, H, Q, K) matrix can be had without building it all."""

    def row(self, query: int) -> Tensor:
        """What one query attends to: (B, H, K) float32, float64 for float64."""

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """The matrix, a few queries at a time, until all have passed; with their largest logits if asked for."""

    def largest_logit(self, query: int) -> Tensor | None:
        """The largest logit of one query, (B, H); None where the scores are not known."""


def _chunks(queries: int) -> Iterator[range]:
    return (range(start, min(start + _CHUNK, queries)) for start in range(0, queries, _CHUNK))


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half precisions; float32 and float64 as they are."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widen(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 where it is that."""
    return x.to(widened_dtype(x.dtype))


@dataclass
class FusedCall:
    """The arguments of one fused attention call, as (B, H, N, D) tensors."""

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    heads_first: bool = True  # the layout of the result: (B, H, N, D), else (B, N, H, D)
    convention: CallingConvention | None = None  # of an operation from outside PyTorch
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # scores of a query

    def row(self, query: int) -> Tensor:
        """Attention of one query: (B, H, K)."""
        return self._scores_of(query).softmax(-1)[:, :, 0]

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """The matrix, a few queries at a time."""
        laid_out = replace(self, k=self._keys.contiguous())  # once, instead of in the product of every chunk
        for queries in _chunks(self.q.shape[2]):
            scores = laid_out._scores(slice(queries.start, queries.stop))
            yield Chunk(queries, scores.softmax(-1), scores.amax(-1) if logits else None)

    def largest_logit(self, query: int) -> Tensor:
        """Of one query: (B, H)."""
        return self._scores_of(query).amax((-2, -1))

    def _scores_of(self, query: int) -> Tensor:
        """Of one query, (B, H, 1, K); kept, as its row and its largest logit are both asked for."""
        if query not in self._kept:
            self._kept = {query: self._scores(slice(query, query + 1))}
        return self._kept[query]

    @functools.cached_property
    def _keys(self) -> Tensor:
        k, heads = widen(self.k), self.q.shape[1]
        return k.repeat_interleave(heads // k.shape[1], 1) if k.shape[1] != heads else k  # grouped queries

    def _scores(self, queries: slice) -> Tensor:
        """What enters the softmax of some queries: (B, H, queries, K)."""
        q, k = widen(self.q[:, :, queries]), self._keys
        scale = self.scale if self.scale is not None else 1 / math.sqrt(q.shape[-1])
        q = q * scale
        # A single query as k · q: with the keys to the right, those of several images would be copied and transposed.
        scores = (k @ q.mT).mT if q.shape[2] == 1 else q @ k.mT  # (B, H, queries, K)
        if self.bias is not None:
            bias = self.bias[..., queries, :] if self.bias.ndim > 1 and self.bias.shape[-2] > 1 else self.bias
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        if self.causal:
            index = torch.arange(self.q.shape[2], device=q.device)[queries]
            scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > index[:, None], -math.inf)
        return scores

    def output(self, out: Tensor) -> Tensor:
        """The operation's own result, (B, H, Q, D)."""
        batch, heads, length, _ = self.q.shape
        if self.heads_first:
            return out.reshape(batch, heads, length, -1)
        return out.reshape(batch, length, heads, -1).transpose(1, 2)


class Memory:
    """The memory that a tensor is in, recognised without being kept: the model alone decides how long it lives."""

    def __init__(self, tensor: Tensor) -> None:
        self._numel, self._pointer = tensor.numel(), _pointer(tensor)
        self._storage = None if self._pointer is None else StorageWeakRef(tensor.untyped_storage())

    def holds(self, tensor: Any) -> bool:
        """Whether these are the same numbers in memory, whatever their shape, and it has not been freed since."""
        if self._storage is None or not isinstance(tensor, Tensor) or tensor.numel() != self._numel:
            return False
        return _pointer(tensor) == self._pointer and not self._storage.expired()

    def offset(self, tensor: Tensor) -> int:
        """Where a tensor that overlaps begins, in numbers from the first one."""
        return (tensor.data_ptr() - (self._pointer or 0)) // tensor.element_size()

    @property
    def is_freed(self) -> bool:
        """Whether nothing can be found in it again."""
        return self._storage is None or self._storage.expired()

    def overlaps(self, tensor: Tensor) -> bool:
        """Whether the tensor is a part of these numbers, or of what is in the same memory."""
        if self._storage is None or self._storage.expired() or _pointer(tensor) is None:
            return False
        return bool(StorageWeakRef(tensor.untyped_storage()).cdata == self._storage.cdata)


def _pointer(x: Tensor) -> int | None:
    try:
        return x.data_ptr() or None
    except RuntimeError:  # a subclass without storage of its own
        return None


@dataclass(frozen=True, eq=False)
class Weights:
    """What is kept of a softmax of scores (..., Q, K) until it meets V: a few rows and no matrix.

    With the matrices themselves, a forward of a large image would take several times the memory that it takes alone.
    """

    shape: torch.Size
    memory: Memory
    path: str  # of the module in which it ran
    rows: Mapping[Query, Tensor]  # (..., K) of each query that may be asked for
    largest_logits: Tensor | None = None  # (..., Q) of the scores, where they are asked for
    contiguous: bool = True  # each matrix row by row, so that some of its rows can be told by where they are


@dataclass
class ExplicitCall:
    """What met V as the left operand of a batched product, and the softmaxes (..., Q, K) that it may be."""

    weights: list[Weights]  # since the product before; the last one is the most likely
    applied: Tensor  # (L, Q, K), or (L, H, Q, K) where the product had its heads among the queries
    values: Tensor  # (L, K, D), or (L, H, K, D)
    swapped: bool = False  # the product was (D, K) times (K, Q)
    folded_heads: int = 0  # that the product had among its queries
    largest_logits: Tensor | None = None  # (L, Q): of each query, the largest of the scores that became weights
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)  # (B, H, Q, K)
    part: slice | None = None  # which queries' rows of the softmax are applied, where not all of them are

    def result(self, product: Tensor) -> Tensor:
        """A view of what the product gave in which queries stand as in ``applied``: (L, Q, D), or (L, H, Q, D)."""
        product = product.mT if self.swapped else product
        return product.unflatten(-2, (self.folded_heads, -1)) if self.folded_heads else product

    def row(self, query: int) -> Tensor:
        """Attention of one query, (B, H, K), which does not keep the matrix alive."""
        return self._part(slice(query, query + 1))[:, :, 0].clone()

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """The matrix, a few queries at a time."""
        largest = self._logits() if logits else None
        for queries in _chunks(self.shape[2]):
            part = slice(queries.start, queries.stop)
            yield Chunk(queries, self._part(part), None if largest is None else largest[..., part])

    def largest_logit(self, query: int) -> Tensor | None:
        """Of one query: (B, H)."""
        logits = self._logits()
        return None if logits is None else logits[..., query]

    def _logits(self) -> Tensor | None:
        known, (batch, heads, queries, _) = self.largest_logits, self.shape
        if known is None or known.numel() != batch * heads * queries:  # other heads than those that are applied
            return None
        return widen(known).reshape(batch, heads, queries)

    def _part(self, queries: slice) -> Tensor:
        batch, heads, _, keys = self.shape
        return widen(self.applied[..., queries, :]).reshape(batch, heads, -1, keys)


def regroup(x: Tensor, images: int, folding: Folding) -> Tensor:
    """(B, H, …) of what has its heads and its batch in another order, or in one dimension."""
    shape = (images, -1) if folding == "batch first" else (-1, images)
    regrouped: Tensor = x.flatten(0, 1).unflatten(0, shape)
    return regrouped if folding == "batch first" else regrouped.transpose(0, 1)


@dataclass
class Regrouped:
    """Attention whose batch and heads are folded, or stand the other way round."""

    source: AttentionSource
    images: int
    folding: Folding

    def row(self, query: int) -> Tensor:
        """Attention of one query: (B, H, K)."""
        return regroup(self.source.row(query), self.images, self.folding)

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """The matrix, a few queries at a time."""
        for queries, rows, largest in self.source.chunks(logits=logits):
            regrouped = None if largest is None else regroup(largest, self.images, self.folding)
            yield Chunk(queries, regroup(rows, self.images, self.folding), regrouped)

    def largest_logit(self, query: int) -> Tensor | None:
        """Of one query: (B, H)."""
        logit = self.source.largest_logit(query)
        return None if logit is None else regroup(logit, self.images, self.folding)
