"""Hold sketches of the tokens from ablated forwards: at attention operations, and where modules begin and end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.observe.attention_rows import Folding, Sequences
from attn_monitor.capture.observe.kinds.attention_product import explains_scores
from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.random_projections import change_threshold, coarsest

Call = tuple[str, int]
"""A module's path, and the number of its earlier calls in the same forward."""


@dataclass
class SiteFormat:
    """Describe the layout of one site's tensors.

    Attributes:
        folding: How batch and heads are folded into one axis, None where they are not.
        sums_to_1: Whether each row of the weights sums to 1.
        mark_strength: Standard deviation of the marks in its results, None before the first ones.
        scores_are_products: Whether scores are products of queries and keys; None until two images have shown it.
        scores: Until then, for each image, some rows of the scores in each possible layout, (H, Q, K).
        products: Until then, for each image, some rows of the products that the scores may be, (H, Q, K).
    """

    folding: Folding | None
    sums_to_1: bool = True
    mark_strength: float | None = None
    scores_are_products: bool | None = None
    scores: list[list[Tensor]] = field(default_factory=list)
    products: list[list[Tensor]] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        """Return the number of sequences of each image in the batch."""
        return self.folding.count if isinstance(self.folding, Sequences) else 1

    def decide(self) -> bool:
        """Decide whether scores are products once two images were seen; return True where they turn out to be none."""
        if self.scores_are_products is not None or len(self.scores) < 2:
            return False
        pairs = itertools.product(zip(*self.scores[:2], strict=False), zip(*self.products[:2], strict=False))
        self.scores_are_products = len(self.products) > 1 and any(_explain(*pair) for pair in pairs)
        self.scores, self.products = [], []
        return not self.scores_are_products


def _explain(scores: Sequence[Tensor], products: Sequence[Tensor]) -> bool:
    same = len({tuple(matrix.shape) for matrix in (*scores, *products)}) == 1
    return same and explains_scores(torch.stack(list(products)), torch.stack(list(scores)))


@dataclass(frozen=True)
class SiteTokens:
    """Hold sketches of the tokens at one attention operation.

    Attributes:
        v: Values, (B, K, S), with S numbers in a sketch.
        heads: Values of each head, (B, H, K, S), None where they were not kept.
        q: Queries, (B, Q, S), None where they are not known.
        k: Keys, (B, K, S), None likewise.
        queries: Number of queries.
        dtype: Precision of the tokens, the coarsest where it differs between tensors.
        device: The device on which the tokens were computed.
        within: Calls of the enclosing modules, the outermost first.
    """

    v: Tensor
    heads: Tensor | None
    q: Tensor | None
    k: Tensor | None
    queries: int
    dtype: torch.dtype
    device: torch.device
    within: tuple[Call, ...]

    @property
    def threshold(self) -> float:
        """Return the relative change above which a token of the site counts as changed."""
        return change_threshold(self.dtype, self.device)


@dataclass(frozen=True)
class Tokens:
    """Hold the tokens of one or several ablated forwards.

    Attributes:
        sites: Sketches at each site.
        entries: (B, T, S) sketches of the tokens that enter each call of a module.
        exits: (B, T, S) sketches of each tensor of tokens that a call returns.
        again: (B, K, S) sketches of what the weights of a site multiply in a further product.
        mixed: Sites where V is an operand of another product that is no attention.
        parts: Sites where the softmax is used in a further product, for other keys or by other heads.
        sums: Sites where the weights multiply the same number for all keys.
        rivals: Sites after which a tensor that could be their weights multiplies other values.
    """

    sites: dict[SiteKey, SiteTokens] = field(default_factory=dict)
    entries: dict[Call, Tensor] = field(default_factory=dict)
    exits: dict[Call, tuple[Tensor, ...]] = field(default_factory=dict)
    again: dict[SiteKey, Tensor] = field(default_factory=dict)
    mixed: set[SiteKey] = field(default_factory=set)
    parts: set[SiteKey] = field(default_factory=set)
    sums: set[SiteKey] = field(default_factory=set)
    rivals: set[SiteKey] = field(default_factory=set)


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Concatenate the tokens of several batches, leaving out those that differ in shape or are missing in a batch."""
    if len(parts) == 1:
        return parts[0]
    sites: dict[SiteKey, SiteTokens] = {}
    for key, first in parts[0].sites.items():
        all_parts = [p.sites[key] for p in parts if key in p.sites]
        if len(all_parts) < len(parts) or any(o.v.shape[1:] != first.v.shape[1:] for o in all_parts):
            continue
        tensors: dict[str, Any] = {}
        for name in ("v", "q", "k", "heads"):
            known = [t for t in (getattr(o, name) for o in all_parts) if t is not None]
            # One batch may have seen q otherwise.
            alike = len(known) == len(parts) and len({t.shape[1:] for t in known}) == 1
            tensors[name] = torch.cat(known) if alike else None
        sites[key] = replace(first, **tensors, dtype=coarsest(*(o.dtype for o in all_parts)))
    return Tokens(
        sites,
        _concatenate_values([p.entries for p in parts]),
        _concatenate_exits([p.exits for p in parts]),
        _concatenate_values([p.again for p in parts]),
        set().union(*(p.mixed for p in parts)),
        set().union(*(p.parts for p in parts)),
        set().union(*(p.sums for p in parts)),
        set().union(*(p.rivals for p in parts)),
    )


def _concatenate_values(parts: Sequence[Mapping[Any, Tensor]]) -> dict[Any, Tensor]:
    first = parts[0]
    shared = [k for k in first if all(k in part and part[k].shape[1:] == first[k].shape[1:] for part in parts)]
    return {k: torch.cat([part[k] for part in parts]) for k in shared}


def _concatenate_exits(parts: Sequence[Mapping[Call, tuple[Tensor, ...]]]) -> dict[Call, tuple[Tensor, ...]]:
    first, numbered = parts[0], [{(c, n): t for c, all_ in p.items() for n, t in enumerate(all_)} for p in parts]
    joined = _concatenate_values(numbered)
    return {
        call: tuple(joined[call, n] for n in range(len(all_)) if (call, n) in joined) for call, all_ in first.items()
    }
