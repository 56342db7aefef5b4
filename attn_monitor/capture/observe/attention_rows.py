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


@dataclass(frozen=True)
class Sequences:
    """Several sequences of tokens for each image in the batch, (B · count, H, …), such as one for each frame of a clip.

    They are read as one attention between all tokens, which is 0 between two sequences.
    """

    count: int


Folding = Literal["batch first", "heads first"] | Sequences
"""The order of batch and heads where they share one dimension: (B·H, …) or (H·B, …); or sequences in the batch."""


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
    """Reshape a tensor with its batch and heads folded or swapped, or (B · S, H, T, D), to (B, H, …)."""
    if isinstance(folding, Sequences):
        joined: Tensor = x.unflatten(0, (images, folding.count)).transpose(1, 2).flatten(2, 3)
        return joined
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


@dataclass
class JoinedSequences:
    """Wrap a source of (B · S, H, Q, K) sequences, and return rows over the keys of all, (B, H, …, S · K)."""

    source: AttentionSource
    sequences: int
    queries: int  # of each sequence

    def row(self, query: int) -> Tensor:
        """Return one query's attention weights, (B, H, S · K)."""
        number, own = divmod(query, self.queries)
        rows = self.source.row(own)
        return self._spread(rows[:, :, None], range(number, number + 1))[:, :, 0]

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """Yield the rows of all queries in chunks, which follow one another in no particular order."""
        for queries, rows, largest in self.source.chunks(logits=logits):
            together = max(1, _CHUNK // len(queries)) if len(queries) == self.queries else 1
            for start in range(0, self.sequences, together):
                taken = range(start, min(start + together, self.sequences))
                first = taken[0] * self.queries + queries[0]
                own = None if largest is None else self._of(largest, taken).transpose(1, 2).flatten(2)
                yield Chunk(range(first, first + len(taken) * len(queries)), self._spread(rows, taken), own)

    def largest_logit(self, query: int) -> Tensor | None:
        """Return one query's largest logit, (B, H); None if the scores are unknown."""
        number, own = divmod(query, self.queries)
        logit = self.source.largest_logit(own)
        return None if logit is None else self._of(logit, range(number, number + 1))[:, 0]

    def _of(self, x: Tensor, sequences: range) -> Tensor:
        """Return what is of some sequences in (B · S, …), as (B, some, …)."""
        of_image: Tensor = x.unflatten(0, (-1, self.sequences))
        return of_image[:, sequences.start : sequences.stop]

    def _spread(self, rows: Tensor, sequences: range) -> Tensor:
        """Return rows (B · S, H, queries, K) of some sequences as (B, H, some · queries, S · K), 0 for other keys."""
        batch, heads, queries, keys = rows.shape
        shape = (batch // self.sequences, heads, len(sequences), queries, self.sequences, keys)
        spread = rows.new_zeros(shape)
        for number, sequence in enumerate(sequences):
            spread[:, :, number, :, sequence] = self._of(rows, range(sequence, sequence + 1))[:, 0]
        return spread.flatten(4).flatten(2, 3)
