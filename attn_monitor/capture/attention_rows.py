"""Read rows of attention that has run: recomputed from q and k (fused), or sliced from its softmax (explicit).

No (queries, keys) matrix is ever built: a single row is read alone, and all rows are read in chunks.
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
"""A token index, "mean" over all queries, or a tuple of ascending indices to average over."""

Folding = Literal["batch first", "heads first"]
"""The order of batch and heads where they share one dimension: (B·H, …) or (H·B, …)."""


class CallingConvention(NamedTuple):
    """Describe how a third-party attention kernel takes its arguments and lays out its result."""

    packed_dim: int  # the dimension of length 3 that holds q, k and v; -1 where they are separate tensors
    tokens_first: bool  # (B, N, H, D), else (B, H, N, D)
    scale: float
    causal: bool
    heads_first_out: bool  # the result is (B, H, N, D), else (B, N, H, D)


_CHUNK = 64  # queries per chunk: memory stays O(tokens)


class Chunk(NamedTuple):
    """Hold the attention rows of a few queries.

    Attributes:
        queries: Ascending token indices.
        rows: (B, H, queries, K).
        largest_logits: (B, H, queries), each query's largest logit (scale · q·k + bias over unmasked keys); None if
            the scores are unknown or were not requested.
    """

    queries: Sequence[int]
    rows: Tensor
    largest_logits: Tensor | None


class AttentionSource(Protocol):
    """Give access to parts of a (B, H, Q, K) attention matrix without building it."""

    def row(self, query: int) -> Tensor:
        """Return one query's attention weights, (B, H, K), in float32 (float64 for float64)."""

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """Yield the rows of all queries in chunks; ``logits`` adds their largest logits."""

    def largest_logit(self, query: int) -> Tensor | None:
        """Return one query's largest logit, (B, H); None if the scores are unknown."""


def _chunks(queries: int) -> Iterator[range]:
    return (range(start, min(start + _CHUNK, queries)) for start in range(0, queries, _CHUNK))


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for float16 and bfloat16, and any other dtype unchanged."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widen(x: Tensor) -> Tensor:
    """Convert float16 and bfloat16 tensors to float32."""
    return x.to(widened_dtype(x.dtype))


@dataclass
class FusedCall:
    """Hold the arguments of one fused attention call as (B, H, N, D) tensors."""

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    heads_first: bool = True  # the result is (B, H, N, D), else (B, N, H, D)
    convention: CallingConvention | None = None  # of a third-party operation
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # scores of one query

    def row(self, query: int) -> Tensor:
        """Return one query's attention weights, (B, H, K)."""
        return self._scores_of(query).softmax(-1)[:, :, 0]

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """Yield the rows of all queries in chunks."""
        laid_out = replace(self, k=self._keys.contiguous())  # copy once instead of in every chunk's product
        for queries in _chunks(self.q.shape[2]):
            scores = laid_out._scores(slice(queries.start, queries.stop))
            yield Chunk(queries, scores.softmax(-1), scores.amax(-1) if logits else None)

    def largest_logit(self, query: int) -> Tensor:
        """Return one query's largest logit, (B, H)."""
        return self._scores_of(query).amax((-2, -1))

    def _scores_of(self, query: int) -> Tensor:
        """Return one query's scores, (B, H, 1, K), cached because its row and its largest logit both need them."""
        if query not in self._kept:
            self._kept = {query: self._scores(slice(query, query + 1))}
        return self._kept[query]

    @functools.cached_property
    def _keys(self) -> Tensor:
        k, heads = widen(self.k), self.q.shape[1]
        return k.repeat_interleave(heads // k.shape[1], 1) if k.shape[1] != heads else k  # grouped queries

    def _scores(self, queries: slice) -> Tensor:
        """Compute the softmax inputs of some queries, (B, H, queries, K)."""
        q, k = widen(self.q[:, :, queries]), self._keys
        scale = self.scale if self.scale is not None else 1 / math.sqrt(q.shape[-1])
        q = q * scale
        # For a single query compute k · q: q · kᵀ would copy and transpose the keys of several images.
        scores = (k @ q.mT).mT if q.shape[2] == 1 else q @ k.mT  # (B, H, queries, K)
        if self.bias is not None:
            bias = self.bias[..., queries, :] if self.bias.ndim > 1 and self.bias.shape[-2] > 1 else self.bias
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        if self.causal:
            index = torch.arange(self.q.shape[2], device=q.device)[queries]
            scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > index[:, None], -math.inf)
        return scores

    def output(self, out: Tensor) -> Tensor:
        """View the operation's own result as (B, H, Q, D)."""
        batch, heads, length, _ = self.q.shape
        if self.heads_first:
            return out.reshape(batch, heads, length, -1)
        return out.reshape(batch, length, heads, -1).transpose(1, 2)


class Memory:
    """Recognise a tensor's memory without keeping it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._numel, self._pointer = tensor.numel(), _pointer(tensor)
        self._storage = None if self._pointer is None else StorageWeakRef(tensor.untyped_storage())

    def holds(self, tensor: Any) -> bool:
        """Return whether a tensor of any shape is exactly this memory, which has not been freed since."""
        if self._storage is None or not isinstance(tensor, Tensor) or tensor.numel() != self._numel:
            return False
        return _pointer(tensor) == self._pointer and not self._storage.expired()

    def offset(self, tensor: Tensor) -> int:
        """Return the start of an overlapping tensor, in elements from the start of this memory."""
        return (tensor.data_ptr() - (self._pointer or 0)) // tensor.element_size()

    @property
    def is_freed(self) -> bool:
        """Return whether the memory has been freed."""
        return self._storage is None or self._storage.expired()

    def overlaps(self, tensor: Tensor) -> bool:
        """Return whether the tensor shares this storage, which has not been freed since."""
        if self._storage is None or self._storage.expired() or _pointer(tensor) is None:
            return False
        return bool(StorageWeakRef(tensor.untyped_storage()).cdata == self._storage.cdata)


def _pointer(x: Tensor) -> int | None:
    try:
        return x.data_ptr() or None
    except RuntimeError:  # a tensor subclass without storage
        return None


@dataclass(frozen=True, eq=False)
class Weights:
    """Keep a few rows of a softmax (..., Q, K) until it meets V.

    Keeping the whole matrices would multiply the memory that a forward of a large image needs.
    """

    shape: torch.Size
    memory: Memory
    path: str  # of the module in which it ran
    rows: Mapping[Query, Tensor]  # (..., K) for each query that may be requested
    largest_logits: Tensor | None = None  # (..., Q), if requested
    contiguous: bool = True  # row-major, so that an address identifies a row


@dataclass
class ExplicitCall:
    """Hold the left operand of a batched product with V, and the softmaxes (..., Q, K) that it may be."""

    weights: list[Weights]  # since the previous product; the last one is the most likely
    applied: Tensor  # (L, Q, K), or (L, H, Q, K) where the product had its heads among the queries
    values: Tensor  # (L, K, D), or (L, H, K, D)
    swapped: bool = False  # the product was (D, K) times (K, Q)
    folded_heads: int = 0  # number of heads that the product had among its queries
    largest_logits: Tensor | None = None  # (L, Q), each query's largest score
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)  # (B, H, Q, K)
    part: slice | None = None  # the queries with rows that are applied; None for all

    def result(self, product: Tensor) -> Tensor:
        """View the product's result with the queries ordered as in ``applied``: (L, Q, D), or (L, H, Q, D)."""
        product = product.mT if self.swapped else product
        return product.unflatten(-2, (self.folded_heads, -1)) if self.folded_heads else product

    def row(self, query: int) -> Tensor:
        """Return a copy of one query's attention weights, (B, H, K), which does not keep the matrix alive."""
        return self._part(slice(query, query + 1))[:, :, 0].clone()

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """Yield the rows of all queries in chunks."""
        largest = self._logits() if logits else None
        for queries in _chunks(self.shape[2]):
            part = slice(queries.start, queries.stop)
            yield Chunk(queries, self._part(part), None if largest is None else largest[..., part])

    def largest_logit(self, query: int) -> Tensor | None:
        """Return one query's largest logit, (B, H); None if the scores are unknown."""
        logits = self._logits()
        return None if logits is None else logits[..., query]

    def _logits(self) -> Tensor | None:
        known, (batch, heads, queries, _) = self.largest_logits, self.shape
        if known is None or known.numel() != batch * heads * queries:  # not the heads that are applied
            return None
        return widen(known).reshape(batch, heads, queries)

    def _part(self, queries: slice) -> Tensor:
        batch, heads, _, keys = self.shape
        return widen(self.applied[..., queries, :]).reshape(batch, heads, -1, keys)


def regroup(x: Tensor, images: int, folding: Folding) -> Tensor:
    """Reshape a tensor with its batch and heads folded or swapped to (B, H, …)."""
    shape = (images, -1) if folding == "batch first" else (-1, images)
    regrouped: Tensor = x.flatten(0, 1).unflatten(0, shape)
    return regrouped if folding == "batch first" else regrouped.transpose(0, 1)


@dataclass
class Regrouped:
    """Wrap a source with its batch and heads folded or swapped, and return (B, H, …)."""

    source: AttentionSource
    images: int
    folding: Folding

    def row(self, query: int) -> Tensor:
        """Return one query's attention weights, (B, H, K)."""
        return regroup(self.source.row(query), self.images, self.folding)

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """Yield the rows of all queries in chunks."""
        for queries, rows, largest in self.source.chunks(logits=logits):
            regrouped = None if largest is None else regroup(largest, self.images, self.folding)
            yield Chunk(queries, regroup(rows, self.images, self.folding), regrouped)

    def largest_logit(self, query: int) -> Tensor | None:
        """Return one query's largest logit, (B, H); None if the scores are unknown."""
        logit = self.source.largest_logit(query)
        return None if logit is None else regroup(logit, self.images, self.folding)
