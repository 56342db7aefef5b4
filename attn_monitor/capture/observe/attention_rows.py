"""Define access to the rows of an attention that has run.

No (queries, keys) matrix is ever built: a single row is read alone, and all rows are read in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Query = int | Literal["mean"] | tuple[int, ...]
"""A token index, "mean" over all queries, or a tuple of ascending indices to average over."""

Folding = Literal["batch first", "heads first"]
"""The order of batch and heads where they share one dimension: (B·H, …) or (H·B, …)."""


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


def chunks_of(queries: int) -> Iterator[range]:
    """Yield the indices of all queries in chunks."""
    return (range(start, min(start + _CHUNK, queries)) for start in range(0, queries, _CHUNK))


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for float16 and bfloat16, and any other dtype unchanged."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widen(x: Tensor) -> Tensor:
    """Convert float16 and bfloat16 tensors to float32."""
    return x.to(widened_dtype(x.dtype))


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
