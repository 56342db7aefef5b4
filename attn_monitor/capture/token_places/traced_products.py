"""Trace in an ablated forward what attention products are made of, and what else is done with their operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_monitor.capture.observe.kinds.attention_product import AttentionProduct, by_image_and_head, some_queries
from attn_monitor.capture.observe.kinds.explicit import ExplicitAttention
from attn_monitor.capture.observe.kinds.explicit_call import ExplicitCall
from attn_monitor.capture.observe.kinds.kind import ForwardState
from attn_monitor.capture.observe.kinds.weights import Weights, both_ways
from attn_monitor.capture.observe.memory import Memory
from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.random_projections import off_device, sketch
from attn_monitor.capture.token_places.tokens import SiteFormat, Tokens


@dataclass(eq=False)
class _Factors:
    """Hold the operands of a product that may become scores, and samples of its (..., Q, K) result.

    Attributes:
        q: The left operand, (..., Q, D).
        k: The right operand, transposed to (..., K, D).
        count: Number of elements of the result.
        shape: (Q, K).
        samples: Some rows of the result and, where Q = K, of its transpose.
        used: Whether an attention used it; then it is dropped at the next product, to free memory.
    """

    q: Tensor
    k: Tensor
    count: int
    shape: torch.Size
    samples: list[Tensor]
    used: bool = False

    def may_become(self, weights: Tensor) -> bool:
        """Check that the result fits the shape of ``weights``, up to heads among its queries or missing columns."""
        (queries, keys), rows = self.shape, weights.numel() // weights.shape[-1]
        same_rows = self.count == rows * keys and queries % weights.shape[-2] == 0
        return same_rows and weights.shape[-1] >= keys

    def laid_out(self, scores: Tensor) -> list[Tensor]:
        """Reshape scores to (L, Q, K) like the result; with more columns, return their first K and their last K."""
        (queries, keys), more = self.shape, scores.shape[-1] > self.shape[1]
        ends = [scores[..., :keys], scores[..., -keys:]] if more else [scores]
        return [end.reshape(-1, queries, keys) for end in ends]


class TracedProducts(ExplicitAttention):
    """Recognise explicit attention, find its queries and keys, and ablate further products of its weights and V.

    Args:
        state: That of the forward.
        formats: Layout of the tokens at each site to read.
        tokens: Receives the sites with other products, see `Tokens`.
    """

    def __init__(self, state: ForwardState, formats: Mapping[SiteKey, SiteFormat], tokens: Tokens) -> None:
        super().__init__(state)
        self.formats, self.tokens = formats, tokens
        self._factors: list[_Factors] = []  # the last few products that are no attention
        self._operands: list[Memory] = []  # their operands
        self._made_of: dict[Weights, tuple[list[Tensor], _Factors | None]] = {}  # some rows of the scores; q and k
        self._spent: list[tuple[Memory, SiteKey]] = []  # used weights, which another product may use
        self._cut: list[tuple[Memory, SiteKey]] = []  # weights used without some of their keys or heads
        self._values: list[tuple[Memory, SiteKey]] = []  # the last few V
        self._latest: dict[str, SiteKey] = {}  # the last attention of each module

    def see_weights(self, weights: Weights, scores: Tensor, out: Tensor) -> None:
        """Find the product that became these scores."""
        possible = [f for f in reversed(self._factors) if f.may_become(out)]
        queries, keys = out.shape[-2:]  # prefer complete columns, no heads among the queries, then the latest
        factors = min(possible, key=lambda f: (keys - f.shape[1], f.shape[0] != queries), default=None)
        known = factors is not None and self._undecided()
        made_of = [some_queries(part) for part in factors.laid_out(scores)] if factors and known else [], factors
        kept = {*self.pending, *(w for w, _ in self.used)}
        self._made_of = {w: m for w, m in self._made_of.items() if w in kept} | {weights: made_of}

    def see_other_product(self, operands: tuple[Tensor, Tensor], out: Tensor) -> None:
        """Ablate the product if it is a further one of an attention's weights or V; else it may become scores."""
        self._ablate_if_used_again(operands, out)
        if out.is_complex():
            return
        turned = [out, out.mT] if out.shape[-1] == out.shape[-2] else [out]  # scores may be k · q
        samples = [some_queries(m) for m in turned] if self._undecided() else []
        unused = [f for f in self._factors if not f.used]
        left, right = operands
        self._factors = [*unused[-3:], _Factors(left, right.mT, out.numel(), out.shape[-2:], samples)]
        self._operands = [*self._operands[-6:], Memory(left), Memory(right)]

    def see_attention(self, key: SiteKey, product: AttentionProduct) -> None:
        """Take note of an attention of any kind."""
        self._latest[key[0]] = key
        if any(operand.holds(product.v) for operand in self._operands):
            self.tokens.mixed.add(key)
        self._values = [*self._values[-7:], (Memory(product.v), key)]

    def with_operands(self, key: SiteKey, call: ExplicitCall, product: AttentionProduct) -> AttentionProduct:
        """Return the product of a call with its queries and keys, where they are known."""
        met = [*(w.memory for w in call.weights), Memory(call.applied)]
        self._spent = [*self._spent, *((memory, key) for memory in met)][-32:]
        cut = [w.memory for w in call.weights if call.part is None and w.shape.numel() > call.applied.numel()]
        self._cut = [*self._cut, *((memory, key) for memory in cut)][-8:]
        made = [self._made_of[w] for w in reversed(call.weights) if w in self._made_of]
        scores, factors = next((m for m in made if m[1] is not None), ([], None))
        if factors is None or not self._are_products(key, scores, factors):
            return product
        factors.used = True
        q = factors.q
        if call.part is not None and q.shape[-2] == call.weights[-1].shape[-2]:
            q = q[..., call.part, :]
        if call.folded_heads and q.shape[:-1] != product.lead:
            q = q.reshape(*product.lead, -1)
        return replace(product, q=q, k=factors.k)

    def _undecided(self) -> bool:
        return any(site.scores_are_products is None for site in self.formats.values())

    def _ablate_if_used_again(self, operands: tuple[Tensor, Tensor], out: Tensor) -> None:
        for _, left, right in both_ways(operands):
            for weights, key in self._spent:
                if weights.holds(left) and key in self.formats:
                    if torch.equal(right, right[..., :1, :].expand_as(right)):  # it only sums the weights
                        self.tokens.sums.add(key)
                    grouped = by_image_and_head(right, self.state.images, self.formats[key].folding)
                    if grouped is not None:
                        self.tokens.again[key] = off_device(sketch(grouped))
                    out.zero_()
                    return
            for weights, key in self._cut:
                if weights.overlaps(left):
                    self.tokens.parts.add(key)
                    out.zero_()
                    return
            for values, key in self._values:
                if values.holds(right):
                    self.tokens.mixed.add(key)
                    out.zero_()
                    return
            for used, path in self.used:
                same = left.shape[-2:] == used.shape[-2:] and left.numel() == used.shape.numel()
                if same and path == self.state.path:
                    self.tokens.rivals.add(self._latest[path])

    def _are_products(self, key: SiteKey, scores: list[Tensor], factors: _Factors) -> bool:
        """Check that scores are the products, up to a mix of heads and a part that is the same for all images.

        This is assumed until `SiteFormat.decide` has seen two images.
        """
        site = self.formats.get(key)
        if site is None:
            return True
        if site.scores_are_products is None:
            for kept, samples in ((site.scores, scores), (site.products, factors.samples)):
                by_image = [by_image_and_head(sample, self.state.images, site.folding) for sample in samples]
                known = [t[:2] for t in by_image if t is not None]
                if len(known) < len(samples):
                    site.scores_are_products = False
                kept += map(list, zip(*known, strict=True))
        return site.scores_are_products is not False
