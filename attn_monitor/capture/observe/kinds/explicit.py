"""Read explicit attention: a softmax, or another function of scores, that becomes the left operand of a product with V.

The rows are sliced from that operand, which is what the model applies, whatever has become of the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.observe.attention_rows import Chunk, Query, chunks_of, widen
from attn_monitor.capture.observe.kinds.attention_product import AttentionProduct
from attn_monitor.capture.observe.kinds.derived import Derived
from attn_monitor.capture.observe.kinds.kind import (
    AttentionCall,
    AttentionKind,
    ForwardState,
    Operation,
    read_rows,
    unreadable,
)
from attn_monitor.capture.observe.kinds.weights import Weights, are_maps, both_ways, row_of
from attn_monitor.capture.observe.observation import Observation, RefusedObservation

aten = torch.ops.aten

SOFTMAX = {aten._softmax.default, aten._softmax.out, aten.softmax.int_out}
if hasattr(aten, "_safe_softmax"):  # from PyTorch 2.5 on
    SOFTMAX.add(aten._safe_softmax.default)
ELEMENTWISE = {aten.sigmoid.default, aten.relu.default, aten.exp.default}  # turn scores into weights without a softmax
IN_PLACE = {aten.sigmoid_.default, aten.relu_.default, aten.exp_.default}  # the same
PRODUCT = {aten.bmm.default, aten.bmm.out, aten.baddbmm.default}


class ExplicitAttention(AttentionKind):
    """Recognise products of a softmax with V; keep the softmaxes until they meet it."""

    def __init__(self, state: ForwardState) -> None:
        super().__init__(state)
        self.pending: list[Weights] = []  # softmaxes that have not met their V yet
        self.met: list[tuple[Weights, str]] = []  # softmaxes that have and are not freed, and the module
        self._scores: list[tuple[int, ...]] = []  # shapes of the last few products
        self._derived = Derived()  # what was made of the softmaxes

    @staticmethod
    def concerns(func: Any) -> bool:
        """Return whether the operation could be scores becoming weights, or a batched product."""
        return func in SOFTMAX or func in ELEMENTWISE or func in IN_PLACE or func in PRODUCT

    def run(self, operation: Operation) -> tuple[Any, ExplicitCall | None]:
        """Run an operation; a product that applies known weights is an attention."""
        func, args = operation.func, operation.args
        if func in PRODUCT:
            return self._run_product(operation)
        scores = args[0]
        could_be = func in SOFTMAX or self._is_made_of_scores(scores)
        if could_be and func in IN_PLACE:
            scores = scores.clone()
        out = operation.run()
        if could_be and (func not in SOFTMAX or _is_over_keys(args, out)):
            # Inputs of exp are logits up to a constant per query, so their maximum is unknown.
            largest = scores.amax(-1) if self.state.logits and "exp" not in str(func) else None
            weights = Weights.of(out, self.state.path, self.state.queries, largest)
            self.pending = [*self.pending[-31:], weights]  # bounded: softmaxes of gates never meet a V
            self._derived.add(out)
            self.see_weights(weights, scores, out)
        else:
            self.see(operation, out)
        return out, None

    def _run_product(self, operation: Operation) -> tuple[Any, ExplicitCall | None]:
        operands, residual = operation.args[-2:], None
        if len(operation.args) == 3 and self._call(operands) is not None:
            # baddbmm: run the product and the addition as two operations, since the product's result is needed.
            residual = _Residual(operation.args[0], **operation.kwargs)
            operation = Operation(aten.bmm.default, operands, {})
        out = operation.run()
        self.state.products += 1
        call = self._take(operands)
        if call is None:
            self._scores = [*self._scores[-3:], tuple(out.shape)]  # the result of attention is never scores
            self.see(operation, out)
            self.see_other_product(operands, out)
            return out, None
        return out, replace(call, out=out, residual=residual, images=self.state.images)

    def see(self, operation: Operation, out: Any) -> None:
        """Take note of what is made of the softmaxes by an operation of no kind."""
        if self.pending:
            self._derived.see((*operation.args, *operation.kwargs.values()), out)

    def see_weights(self, weights: Weights, scores: Tensor, out: Tensor) -> None:
        """Take note of new weights and the scores that they were made of; subclasses override this."""

    def see_other_product(self, operands: tuple[Tensor, Tensor], out: Tensor) -> None:
        """Take note of a product that is no attention; subclasses override this."""

    def forget(self) -> None:
        """Drop the softmaxes."""
        self.pending, self.met = [], []
        self._derived.forget()

    def _is_made_of_scores(self, x: Any) -> bool:
        return isinstance(x, Tensor) and any(
            x.shape[-2:] == scores[-2:] and x.numel() == math.prod(scores) for scores in self._scores
        )

    def _call(self, operands: tuple[Tensor, Tensor]) -> ExplicitCall | None:
        """Interpret a product as attention by softmaxes that have not met a V yet, else by those that have."""
        if are_maps(operands):  # as in a rollout
            return None
        call = _first_product(self.pending, operands, self.state.images)
        if call is not None and any(w.memory.overlaps(call.applied) for w in call.weights):
            return call
        further = _further_product(self.met, operands, self.state.path)
        # With as many tokens as channels of a head, q and V have the shape of a softmax too.
        return further or (call if call is not None and self._derived.holds(call.applied) else None)

    def _take(self, operands: tuple[Tensor, Tensor]) -> ExplicitCall | None:
        """Interpret a product as attention; keep the softmaxes that it does not use pending."""
        call = self._call(operands) if self.pending or self.met else None
        if call is None:
            return None
        used = [w for w in call.weights if w.memory.holds(call.applied)][-1:] or call.weights
        self.pending = [p for p in self.pending if p not in used]
        if not self.pending:
            self._derived.forget()
        met = [(w, p) for w, p in self.met if not w.memory.is_freed and w not in used]
        self.met = [*met, *((w, self.state.path) for w in used)]
        logits = used[0].largest_logits if len(used) == 1 else None  # several are ambiguous
        logits = logits[..., call.part] if logits is not None and call.part is not None else logits
        return replace(call, weights=used, largest_logits=logits)


@dataclass(frozen=True)
class _Residual:
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
    residual: _Residual | None = None
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


def _is_over_keys(args: tuple[Any, ...], out: Any) -> bool:
    """Return whether a softmax could be attention: three or more dimensions, over the last one."""
    return isinstance(out, Tensor) and out.ndim >= 3 and args[1] in (-1, out.ndim - 1)


def _first_product(weights: Sequence[Weights], operands: tuple[Tensor, Tensor], images: int) -> ExplicitCall | None:
    """Interpret a batched product as attention if its left operand fits a softmax before it; None otherwise.

    The left operand may have heads that share one V folded into the queries, (L, H·Q, K), or lack columns of the
    softmax that meet no V, such as a sink, or hold some of its rows only.
    """
    for swapped, left, right in both_ways(operands):
        if fitting := [w for w in weights if w.fit(left, images)]:
            return ExplicitCall(fitting, left, right, swapped)
        if folded := [w for w in weights if w.are_folded_in(left)]:
            queries = folded[-1].shape[-2]
            heads = left.shape[-2] // queries
            shared = right[:, None].expand(-1, heads, -1, -1)
            return ExplicitCall(folded, left.unflatten(-2, (heads, queries)), shared, swapped, heads)
        if cut := [w for w in weights if w.are_cut_in(left)]:
            return ExplicitCall(cut, left, right, swapped)
        if some := [(w, rows) for w in weights if (rows := w.rows_in(left)) is not None]:
            return ExplicitCall([some[-1][0]], left, right, swapped, part=some[-1][1])
    return None


def _further_product(
    met: Sequence[tuple[Weights, str]], operands: tuple[Tensor, Tensor], path: str
) -> ExplicitCall | None:
    """Interpret a product as attention by weights that have met another V before; None otherwise.

    Either the module at ``path`` is another item of a list than the one where they met V (blocks that share a map), or
    the left operand holds some of their rows only.
    """
    for swapped, left, right in both_ways(operands):
        for weights, other in reversed(met):
            if weights.memory.holds(left) and left.shape[-2:] == weights.shape[-2:] and _other_item(path, other):
                return ExplicitCall([weights], left, right, swapped)
            if (rows := weights.rows_in(left)) is not None:
                return ExplicitCall([weights], left, right, swapped, part=rows)
    return None


def _other_item(path: str, other: str) -> bool:
    """Return whether two modules are in different items of one list."""
    names = zip(path.split("."), other.split("."), strict=False)
    return next((a.isdigit() and b.isdigit() for a, b in names if a != b), False)


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
