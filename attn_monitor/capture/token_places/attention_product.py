"""The product of an attention with V in a silent forward, and what is written in place of its result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.capture.attention_rows import Folding, widen
from attn_monitor.capture.token_places.random_projections import noise_like, off_device, random_matrix


@dataclass(frozen=True)
class AttentionProduct:
    """A result, to be overwritten, and what it was made of. ``lead`` is (…, Q) of the queries."""

    out: Tensor
    lead: torch.Size
    q: Tensor | None  # None where the scores are not known to be products of queries and keys
    k: Tensor | None
    v: Tensor
    heads_first: bool = True

    @property
    def width(self) -> int:
        """Channels of one query's result."""
        return self.out.numel() // math.prod(self.lead)

    def query_as_result(self) -> Tensor | None:
        """Each query in the place of its own result; None where it is not known."""
        if self.q is None or self.q.shape[:-1] != self.lead:
            return None
        # As it is where it fits: of channel attention, a projection would mix tokens.
        same = self.q.shape[-1] == self.width
        return self.q if same else self.q @ random_matrix(self.q.shape[-1], self.width, self.q)

    def marked_result(self, marks: Tensor, folding: Folding | None, strength: float) -> Tensor | None:
        """Noise of this strength as results of the (B, Q) marked queries, and nothing for the others."""
        (*lead, queries), batch = self.lead, len(marks)
        heads = math.prod(lead) // batch
        if marks.shape[1] != queries or heads * batch != math.prod(lead):
            return None
        noise = noise_like((heads, queries, self.width), self.out) * strength
        content = noise * marks[:, None, :, None].to(noise)  # (B, H, Q, D)
        marked: Tensor = content if folding != "heads first" else content.transpose(0, 1)
        return marked.reshape(*self.lead, self.width)

    def strong(self) -> float:
        """A strength that is far above that of values and of results, which are large where rows have large sums."""
        size = max(float(x.float().std().clamp_min(1e-3)) for x in (self.v, self.out))
        return min((1e2 if self.out.dtype == torch.float16 else 1e4) * size, torch.finfo(self.out.dtype).max / 16)

    def overwrite(self, content: Tensor | None) -> None:
        """Put this in place of the result; zeros for None."""
        if content is None:
            self.out.zero_()
        else:
            self.out.copy_((content if self.heads_first else content.transpose(1, 2)).reshape(self.out.shape))


def by_image_and_head(x: Tensor, images: int, folding: Folding | None) -> Tensor | None:
    """(B, H, T, D) of (L, T, D) or (B, H, T, D); None where it is not of this many images."""
    x = x.reshape(-1, *x.shape[-2:])
    if len(x) % images:
        return None
    grouped: Tensor = x.unflatten(0, (-1, images) if folding == "heads first" else (images, -1))
    return grouped.transpose(0, 1) if folding == "heads first" else grouped


_QUERIES = 16  # as many of a matrix as tell what scores are made of


def some_queries(matrix: Tensor) -> Tensor:
    """(L, some, K) of (..., Q, K): a copy of some rows, off the model's device."""
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    return off_device(flat[:, :: max(1, flat.shape[1] // _QUERIES)].clone())


def explains_scores(products: Tensor, scores: Tensor) -> bool:
    """Whether what differs between two images' scores is what differs between their products, with heads mixed.

    Both are (2, H, Q, K). Some of it may come on top, such as a bias that is computed from the queries; and a number
    for each query, which changes nothing of its softmax and is in a `log_softmax`.
    """
    finite = scores[1].isfinite() & scores[0].isfinite()
    changes = [torch.where(finite, widen(t[1] - t[0]), 0).double() for t in (scores, products)]
    known = finite.sum(-1, keepdim=True).clamp_min(1)
    up_to_a_number = [torch.where(finite, c - c.sum(-1, keepdim=True) / known, 0) for c in changes]
    return _are_a_mix(*changes) or _are_a_mix(*up_to_a_number)


def _are_a_mix(scores: Tensor, products: Tensor) -> bool:
    """Whether most of (H, Q, K) scores is a mix of the products of several heads."""
    score, p = scores.flatten(1), products.flatten(1)
    mix = score @ p.T @ torch.linalg.pinv(p @ p.T)
    return float((score - mix @ p).norm()) <= 0.7 * float(score.norm())
