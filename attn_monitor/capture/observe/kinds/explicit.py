"""Read explicit attention: a softmax, or another function of scores, that becomes the left operand of a product with V.

The rows are sliced from that operand, which is what the model applies, whatever has become of the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.observe.kinds.derived import Derived
from attn_monitor.capture.observe.kinds.explicit_call import ExplicitCall, Residual
from attn_monitor.capture.observe.kinds.kind import AttentionKind, ForwardState, Operation
from attn_monitor.capture.observe.kinds.weights import Weights, are_maps, both_ways

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
        self.pending: list[Weights] = []  # softmaxes that no product has multiplied with a V yet
        self.used: list[tuple[Weights, str]] = []  # others that are still in memory, each with its module
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
            self.on_other_operation(operation, out)
        return out, None

    def _run_product(self, operation: Operation) -> tuple[Any, ExplicitCall | None]:
        operands, residual = operation.args[-2:], None
        if len(operation.args) == 3 and self._match(operands) is not None:
            # baddbmm: run the product and the addition as two operations, since the product's result is needed.
            residual = Residual(operation.args[0], **operation.kwargs)
            operation = Operation(aten.bmm.default, operands, {})
        out = operation.run()
        self.state.products += 1
        call = self._consume(operands)
        if call is None:
            self._scores = [*self._scores[-3:], tuple(out.shape)]  # the result of attention is never scores
            self.on_other_operation(operation, out)
            self.see_other_product(operands, out)
            return out, None
        return out, replace(call, out=out, residual=residual, images=self.state.images)

    @property
    def follows_others(self) -> bool:
        """Return whether a softmax has not met its V yet."""
        return bool(self.pending)

    def on_other_operation(self, operation: Operation, out: Any) -> None:
        """Take note of what is made of the softmaxes by an operation of no kind."""
        if self.pending:
            self._derived.see((*operation.args, *operation.kwargs.values()), out)

    def see_weights(self, weights: Weights, scores: Tensor, out: Tensor) -> None:
        """Take note of new weights and the scores that they were made of; subclasses override this."""

    def see_other_product(self, operands: tuple[Tensor, Tensor], out: Tensor) -> None:
        """Take note of a product that is no attention; subclasses override this."""

    def forget(self) -> None:
        """Drop the softmaxes."""
        self.pending, self.used = [], []
        self._derived.forget()

    def _is_made_of_scores(self, x: Any) -> bool:
        return isinstance(x, Tensor) and any(
            x.shape[-2:] == scores[-2:] and x.numel() == math.prod(scores) for scores in self._scores
        )

    def _match(self, operands: tuple[Tensor, Tensor]) -> ExplicitCall | None:
        """Interpret a product as attention by softmaxes that have not met a V yet, else by those that have."""
        if are_maps(operands):  # as in a rollout
            return None
        call = _first_product(self.pending, operands, self.state.images)
        if call is not None and any(w.memory.overlaps(call.applied) for w in call.weights):
            return call
        further = _further_product(self.used, operands, self.state.path)
        # With as many tokens as channels of a head, q and V have the shape of a softmax too.
        return further or (call if call is not None and self._derived.holds(call.applied) else None)

    def _consume(self, operands: tuple[Tensor, Tensor]) -> ExplicitCall | None:
        """Interpret a product as attention; keep the softmaxes that it does not use pending."""
        call = self._match(operands) if self.pending or self.used else None
        if call is None:
            return None
        used = [w for w in call.weights if w.memory.holds(call.applied)][-1:] or call.weights
        self.pending = [p for p in self.pending if p not in used]
        if not self.pending:
            self._derived.forget()
        before = [(w, p) for w, p in self.used if not w.memory.is_freed and w not in used]
        self.used = [*before, *((w, self.state.path) for w in used)]
        logits = used[0].largest_logits if len(used) == 1 else None  # several are ambiguous
        logits = logits[..., call.part] if logits is not None and call.part is not None else logits
        return replace(call, weights=used, largest_logits=logits)


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
    used: Sequence[tuple[Weights, str]], operands: tuple[Tensor, Tensor], path: str
) -> ExplicitCall | None:
    """Interpret a product as attention by weights that have met another V before; None otherwise.

    Either the module at ``path`` is another item of a list than the one where they met V (blocks that share a map), or
    the left operand holds some of their rows only.
    """
    for swapped, left, right in both_ways(operands):
        for weights, other in reversed(used):
            if weights.memory.holds(left) and left.shape[-2:] == weights.shape[-2:] and _other_item(path, other):
                return ExplicitCall([weights], left, right, swapped)
            if (rows := weights.rows_in(left)) is not None:
                return ExplicitCall([weights], left, right, swapped, part=rows)
    return None


def _other_item(path: str, other: str) -> bool:
    """Return whether two modules are in different items of one list."""
    names = zip(path.split("."), other.split("."), strict=False)
    return next((a.isdigit() and b.isdigit() for a, b in names if a != b), False)
