"""Keep what a forward's softmaxes may need to be read once they meet V, and find the one that a product applies."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.capture.observe.attention_rows import Query, widen, widened_dtype
from attn_monitor.capture.observe.kinds.kind import is_foreign_type
from attn_monitor.capture.observe.memory import Memory


@dataclass(frozen=True, eq=False)
class Weights:
    """Keep a few rows of a softmax (..., Q, K) until it meets V.

    Keeping the whole matrices would multiply the memory that a forward of a large image needs.

    Attributes:
        shape: (..., Q, K).
        memory: Where the matrix is.
        path: Path of the module in which it ran.
        rows: (..., K) for each query that may be read.
        largest_logits: (..., Q), if wanted.
        contiguous: Whether it is row-major, so that an offset identifies a row.
    """

    shape: torch.Size
    memory: Memory
    path: str
    rows: Mapping[Query, Tensor]
    largest_logits: Tensor | None = None
    contiguous: bool = True

    @staticmethod
    def of(matrix: Tensor, path: str, queries: Collection[Query], logits: Tensor | None) -> Weights:
        """Keep the rows of ``queries`` from a matrix (..., Q, K); skip indices that do not exist."""
        last = {q: -1 if q == "mean" else max(q) if isinstance(q, tuple) else q for q in queries}
        known = [] if is_foreign_type(matrix) else [q for q in queries if last[q] < matrix.shape[-2]]
        rows = {query: row_of(matrix, query) for query in known}
        return Weights(matrix.shape, Memory(matrix), path, rows, logits, matrix.is_contiguous())

    def fit(self, left: Tensor, images: int) -> bool:
        """Return whether an operand has as many heads as the softmax, or fewer because some were pruned."""
        heads, kept = (math.prod(shape[:-2]) for shape in (self.shape, left.shape))
        same = self.shape[-2:] == left.shape[-2:]
        return same and (heads == kept or (kept < heads and kept % images == 0))

    def are_folded_in(self, left: Tensor) -> bool:
        """Return whether an operand (L, H·Q, K) has the heads of the softmax among its queries."""
        queries, keys = self.shape[-2:]
        return left.shape[-1] == keys and left.shape[-2] % queries == 0 and left.numel() == self.shape.numel()

    def are_cut_in(self, left: Tensor) -> bool:
        """Return whether an operand lacks columns of the softmax that meet no V, such as a sink."""
        same_rows = self.shape[:-1].numel() == left.shape[:-1].numel() and self.shape[-2] == left.shape[-2]
        return same_rows and self.shape[-1] > left.shape[-1] and self.memory.overlaps(left)

    def rows_in(self, left: Tensor) -> slice | None:
        """Return which queries of the softmax the rows of an operand belong to; None unless it holds some of them."""
        same = self.shape[-1] == left.shape[-1] and self.shape[:-2].numel() == left.shape[:-2].numel()
        if not (same and self.shape[-2] > left.shape[-2] and self.contiguous and self.memory.overlaps(left)):
            return None
        queries, keys = self.shape[-2:]
        first, count = self.memory.offset(left) // keys % queries, left.shape[-2]
        step = left.stride(-2) // keys if count > 1 else 1
        return slice(first, first + (count - 1) * step + 1, step)


def row_of(matrix: Tensor, query: Query) -> Tensor:
    """Copy one query's row, or the mean over several, from (..., Q, K) to (..., K)."""
    if isinstance(query, int):
        return widen(matrix[..., query, :].clone())
    several = matrix if query == "mean" else matrix[..., list(query), :]
    return several.mean(-2, dtype=widened_dtype(matrix.dtype))


def are_maps(operands: tuple[Tensor, Tensor]) -> bool:
    """Return whether both are square (..., K, K) with distributions over keys in rows or columns: maps, and no V."""
    if any(m.shape[-1] != m.shape[-2] or is_foreign_type(m) or m.is_complex() for m in operands):
        return False
    return all(bool((m >= 0).all()) and any(_sum_to_1(m, dim) for dim in (-1, -2)) for m in operands)


def _sum_to_1(matrix: Tensor, dim: int) -> bool:
    return bool(((widen(matrix).sum(dim) - 1).abs() < 0.02).all())


def both_ways(operands: tuple[Tensor, Tensor]) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """Yield the operands of a product as (swapped, left, right): einsum may put V first."""
    yield False, *operands
    yield True, operands[1].mT, operands[0].mT
