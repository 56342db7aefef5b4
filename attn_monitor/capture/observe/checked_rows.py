"""Compare attention rows with the operation's own output while they are read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_monitor.capture.observe.attention_rows import AttentionSource, Chunk, Query, widen
from attn_monitor.capture.observe.tolerance import ManyRows, relative_error


class CheckedRows:
    """Read rows of an attention and compare row·V with its output.

    Args:
        source: The attention.
        values: V, (B, H, K, D).
        output: The operation's result, (B, H, Q, D); None to skip the comparison.

    Attributes:
        error: Largest relative error of the rows read so far, on the device; None without an output.
    """

    def __init__(self, source: AttentionSource, values: Tensor, output: Tensor | None) -> None:
        self.source, self.values, self.output = source, values, output
        self.error: Tensor | None = None
        self._many: ManyRows | None = None

    def read(self, query: Query) -> Tensor:
        """Return one query's row, or the mean over several, (B, H, K)."""
        if isinstance(query, int):
            row = self.source.row(query)
            if self.output is not None:
                self.error = relative_error(row, self._values_like(row), self.output[:, :, query])
            return row
        total, count = torch.zeros((), device=self.values.device), 0
        for queries, rows, _ in self.chunks(None if query == "mean" else query):
            total, count = total + rows.sum(2), count + len(queries)
        return total / count

    def chunks(self, wanted: Sequence[int] | None = None, *, logits: bool = False) -> Iterator[Chunk]:
        """Yield the rows of the ``wanted`` queries (ascending; None for all) in chunks."""
        for chunk in self.source.chunks(logits=logits):
            part = chunk if wanted is None else _of_those(chunk, wanted)
            if len(part.queries):
                self._compare(part)
                yield part

    def _compare(self, chunk: Chunk) -> None:
        if self.output is None:
            return
        if self._many is None:
            self._many = ManyRows(self._values_like(chunk.rows))
        first, last = chunk.queries[0], chunk.queries[-1]
        output = self.output[:, :, first : last + 1]
        if last - first + 1 != len(chunk.queries):
            output = output[:, :, [query - first for query in chunk.queries]]
        error = self._many.relative_error(chunk.rows, output)
        self.error = error if self.error is None else torch.maximum(self.error, error)

    def _values_like(self, rows: Tensor) -> Tensor:
        """Return V with the dtype and the number of heads of the rows (B, H, …)."""
        values = widen(self.values).to(rows.dtype)
        repeats = rows.shape[1] // values.shape[1]  # grouped queries
        return values.repeat_interleave(repeats, 1) if repeats > 1 else values


def _of_those(chunk: Chunk, wanted: Sequence[int]) -> Chunk:
    queries, rows, largest = chunk
    kept = wanted[bisect_left(wanted, queries[0]) : bisect_left(wanted, queries[-1] + 1)]
    if len(kept) == len(queries):
        return chunk
    index = [query - queries[0] for query in kept]
    return Chunk(kept, rows[:, :, index], None if largest is None else largest[..., index])
