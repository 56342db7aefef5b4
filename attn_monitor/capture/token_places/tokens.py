"""What is read in silent forwards: sketches of the tokens at attention operations, and where modules begin and end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.attention_rows import CallingConvention, Folding
from attn_monitor.capture.observation import SiteKey
from attn_monitor.capture.token_places.attention_product import explains_scores
from attn_monitor.capture.token_places.random_projections import change_threshold, coarsest

Call = tuple[str, int]
"""A module's path, and how many times it had been called before within the same forward."""


@dataclass
class SiteFormat:
    """Layout of one site's tensors. ``scores_are_products``: of its queries and keys; None until it is known.

    That takes two images: until then ``scores`` and the ``products`` they may be are kept, some rows of each image.
    """

    folding: Folding | None
    convention: CallingConvention | None
    sums_to_1: bool = True  # each row
    mark_strength: float | None = None  # of marks in its results
    scores_are_products: bool | None = None
    scores: list[list[Tensor]] = field(default_factory=list)  # of each image, the (H, Q, K) that they may be
    products: list[list[Tensor]] = field(default_factory=list)

    def decide(self) -> bool:
        """Settle what scores are made of, if that can be told; whether they are then no products."""
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
    """Sketches of the tokens at one attention operation: (B, T, S), and those of V by head, (B, H, K, S)."""

    v: Tensor
    heads: Tensor | None
    q: Tensor | None
    k: Tensor | None
    queries: int
    dtype: torch.dtype  # the precision that they have, the coarsest where they differ
    device: torch.device  # that they were computed on
    within: tuple[Call, ...]  # calls of the modules around, the outermost first

    @property
    def threshold(self) -> float:
        """The relative change above which one of its tokens counts as changed."""
        return change_threshold(self.dtype, self.device)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one or several silent forwards."""

    sites: dict[SiteKey, SiteTokens] = field(default_factory=dict)
    entries: dict[Call, Tensor] = field(default_factory=dict)  # (B, T, S)
    exits: dict[Call, tuple[Tensor, ...]] = field(default_factory=dict)  # of each tensor that a call returns
    again: dict[SiteKey, Tensor] = field(default_factory=dict)  # what the same weights met in a further product
    mixed: set[SiteKey] = field(default_factory=set)  # sites whose V is in another product that is no attention
    parts: set[SiteKey] = field(
        default_factory=set
    )  # sites whose softmax goes on in a further product, to other keys or by other heads
    sums: set[SiteKey] = field(default_factory=set)  # sites whose weights meet the same number for all keys
    rivals: set[SiteKey] = field(
        default_factory=set
    )  # sites after which what could be their weights meets other values


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of several batches as one: those that were there in each of them and in the same number."""
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
            alike = (
                len(known) == len(parts) and len({t.shape[1:] for t in known}) == 1
            )  # q may be seen otherwise in one
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
