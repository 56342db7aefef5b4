"""Hold the product of attention weights with V: read rows of the operand, and hand over the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.observe.attention_rows import Chunk, Query, chunks_of, widen
from attn_monitor.capture.observe.kinds.attention_product import AttentionProduct
from attn_monitor.capture.observe.kinds.kind import AttentionCall, read_rows, unreadable
from attn_monitor.capture.observe.kinds.weights import Weights, row_of
from attn_monitor.capture.observe.observation import Observation, RefusedObservation


@dataclass(frozen=True)
class Residual:
    """Hold what a fused product and addition adds to its product."""

    other: Tensor
    beta: float = 1
    alpha: float = 1


@dataclass
class ExplicitCall(AttentionCall):
    """Hold the left operand of a batched product with V, and the softmaxes (..., Q, K) that it may be.

    Attributes:
        weights: The softmaxes since the previous product; the last one is the most likely.
        applied: (L, Q, K), or (L, H, Q, K) where the product had its heads among the queries.
        values: (L, K, D), or (L, H, K, D).
        swapped: Whether the product was (D, K) times (K, Q).
        folded_heads: Number of heads that the product had among its queries.
        largest_logits: (L, Q), each query's largest score, None if unknown.
        part: The queries with rows that are applied; None for all.
        out: The product's result.
        residual: What is added to it.
        images: Number of images.
    """

    weights: list[Weights]
    applied: Tensor
    values: Tensor
    swapped: bool = False
    folded_heads: int = 0
    largest_logits: Tensor | None = None
    part: slice | None = None
    out: Tensor = field(default_factory=lambda: torch.empty(0))
    residual: Residual | None = None
    images: int = 1

    @property
    def paths(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the paths of the modules in which the softmaxes ran."""
        return tuple(w.path for w in self.weights)

    def read(self, query: Query, *, verify: bool) -> Observation:
        """Read rows of the operand that meets V, softmax or not; compare them with the product."""
        batch, heads, queries, keys = self._shape
        shape: dict[str, Any] = {
            "op": "softmax -> bmm",
            "batch": batch,
            "heads": heads,
            "queries": queries,
            "keys": keys,
        }
        reason = unreadable(query, queries, self.applied, self.values)
        if reason:
            return RefusedObservation(**shape, reason=reason)
        values = self.values.reshape(batch, heads, keys, -1)
        output = self._result().reshape(batch, heads, queries, -1) if verify else None
        return replace(read_rows(self, values, output, query, shape), mixed=_is_mixed(self, query))

    def product(self) -> AttentionProduct:
        """Return V and the result; queries and keys are not known here."""
        result = self._result()
        return AttentionProduct(result, result.shape[:-1], None, None, self.values)

    def returned(self, out: Any) -> Any:
        """Return the product, with the residual added if there is one."""
        if self.residual is None:
            return out
        other, beta, alpha = self.residual.other, self.residual.beta, self.residual.alpha
        return self.out * alpha + other * beta if beta else self.out * alpha

    def row(self, query: int) -> Tensor:
        """Return a copy of one query's attention weights, (B, H, K), which does not keep the matrix alive."""
        return self._part(slice(query, query + 1))[:, :, 0].clone()

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """Yield the rows of all queries in chunks."""
        largest = self._logits() if logits else None
        for queries in chunks_of(self._shape[2]):
            part = slice(queries.start, queries.stop)
            yield Chunk(queries, self._part(part), None if largest is None else largest[..., part])

    def largest_logit(self, query: int) -> Tensor | None:
        """Return one query's largest logit, (B, H); None if the scores are unknown."""
        logits = self._logits()
        return None if logits is None else logits[..., query]

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        """Return (B, H, Q, K), from leading dimensions (B, H), (B·H,), or more if attention is windowed."""
        last = self.weights[-1].shape
        lead = last[:-2] if last[:-2].numel() == self.applied.shape[:-2].numel() else self.applied.shape[:-2]
        queries, keys = self.applied.shape[-2:]
        total = lead.numel()
        if len(lead) > 1:
            return lead[0], total // lead[0], queries, keys
        whole = total % self.images == 0
        return (self.images, total // self.images, queries, keys) if whole else (total, 1, queries, keys)

    def _result(self) -> Tensor:
        """View the product with the queries ordered as in ``applied``: (L, Q, D), or (L, H, Q, D)."""
        product = self.out.mT if self.swapped else self.out
        return product.unflatten(-2, (self.folded_heads, -1)) if self.folded_heads else product

    def _logits(self) -> Tensor | None:
        known, (batch, heads, queries, _) = self.largest_logits, self._shape
        if known is None or known.numel() != batch * heads * queries:  # not the heads that are applied
            return None
        return widen(known).reshape(batch, heads, queries)

    def _part(self, queries: slice) -> Tensor:
        batch, heads, _, keys = self._shape
        return widen(self.applied[..., queries, :]).reshape(batch, heads, -1, keys)


def _is_mixed(call: ExplicitCall, query: Query) -> Tensor:
    """Return, on the device, whether the applied row equals no softmax before it up to rounding."""
    if call.part is not None:  # a view of the softmax itself
        return call.applied.new_zeros((), dtype=torch.bool)
    applied = row_of(call.applied, query)  # (..., K)
    limit = 8 * torch.finfo(call.applied.dtype).eps
    keys = applied.shape[-1]
    known = [w.rows[query] for w in call.weights if query in w.rows]
    ends = [end for row in known if row.shape[-1] >= keys for end in (row[..., :keys], row[..., -keys:])]
    rows = [row.reshape(applied.shape) for row in ends if row.numel() == applied.numel()]
    if not rows:
        return applied.new_ones((), dtype=torch.bool)
    differences = [((applied - w.to(applied.dtype)).abs() / w.clamp_min(1 / keys)).max() for w in rows]
    return ~(torch.stack(differences).min() <= limit)
