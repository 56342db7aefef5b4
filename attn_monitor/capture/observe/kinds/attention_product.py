"""Represent the product of attention weights with V in an ablated forward, and overwrite its result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.capture.observe.attention_rows import Folding, Sequences, regroup, widen
from attn_monitor.capture.observe.random_projections import noise_like, off_device, random_matrix


@dataclass(frozen=True)
class AttentionProduct:
    """Hold the result of one attention product, which is to be overwritten, and its operands.

    Attributes:
        out: The result, in the memory that the model goes on to read.
        lead: Shape of the queries without channels, (…, Q).
        q: Queries (…, Q, D), None where the scores are not known to be products of queries and keys.
        k: Keys (…, K, D), None likewise.
        v: Values (…, K, D).
    """

    out: Tensor
    lead: torch.Size
    q: Tensor | None
    k: Tensor | None
    v: Tensor

    @property
    def width(self) -> int:
        """Return the number of channels of one query's result."""
        return self.out.numel() // math.prod(self.lead)

    def query_as_result(self) -> Tensor | None:
        """Return the queries in the shape of the result, (…, Q, width); None where they are not known."""
        if self.q is None or self.q.shape[:-1] != self.lead:
            return None
        # Project only where the width differs: in channel attention, a projection would mix tokens.
        same = self.q.shape[-1] == self.width
        return self.q if same else self.q @ random_matrix(self.q.shape[-1], self.width, self.q)

    def marked_result(self, marks: Tensor, folding: Folding | None, strength: float) -> Tensor | None:
        """Return a result that is noise at the marked queries and zero at the others.

        Args:
            marks: (B, Q) bool, True at the marked queries.
            folding: How the batch and the heads are folded into the first axis, None where they are not.
            strength: Standard deviation of the noise.

        Returns:
            (…, Q, width), None where the product has another number of queries or is not of B images.
        """
        (*lead, queries), batch = self.lead, len(marks)
        sequences = folding.count if isinstance(folding, Sequences) else 1
        heads = math.prod(lead) // batch // sequences
        if marks.shape[1] != sequences * queries or heads * sequences * batch != math.prod(lead):
            return None
        noise = noise_like((heads, marks.shape[1], self.width), self.out) * strength
        content = noise * marks[:, None, :, None].to(noise)  # (B, H, Q, D)
        if sequences > 1:
            content = content.unflatten(2, (sequences, queries)).transpose(1, 2)
        marked: Tensor = content if folding != "heads first" else content.transpose(0, 1)
        return marked.reshape(*self.lead, self.width)

    def queries(self, folding: Folding | None) -> int:
        """Return the number of queries for each image."""
        return self.lead[-1] * (folding.count if isinstance(folding, Sequences) else 1)

    def strong(self) -> float:
        """Return a standard deviation for marks, far above that of V and of the result, that does not overflow."""
        size = max(float(x.float().std().clamp_min(1e-3)) for x in (self.v, self.out))
        return min((1e2 if self.out.dtype == torch.float16 else 1e4) * size, torch.finfo(self.out.dtype).max / 16)

    def overwrite(self, content: Tensor | None) -> None:
        """Replace the result by ``content`` (…, Q, width), or by zeros where it is None."""
        if content is None:
            self.out.zero_()
        else:
            self.out.copy_(content.reshape(self.out.shape).clone())  # an operation may write its result to q


def by_image_and_head(x: Tensor, images: int, folding: Folding | None) -> Tensor | None:
    """Reshape (L, T, D) or (B, H, T, D) to (B, H, T, D); return None where L is no multiple of ``images``.

    Sequences are joined, (B · S, H, T, D) to (B, H, S · T, D).
    """
    x = x.reshape(-1, *x.shape[-2:])
    sequences = folding.count if isinstance(folding, Sequences) else 1
    if len(x) % (images * sequences):
        return None
    return regroup(x.unflatten(0, (images * sequences, -1)), images, folding or "batch first")


_QUERIES = 16  # rows of a matrix that suffice to compare scores with products


def some_queries(matrix: Tensor) -> Tensor:
    """Copy some rows of a (..., Q, K) matrix to the host, as (L, some, K)."""
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    return off_device(flat[:, :: max(1, flat.shape[1] // _QUERIES)].clone())


def explains_scores(products: Tensor, scores: Tensor) -> bool:
    """Check whether the scores of two images differ as their products of queries and keys do, up to a mix of heads.

    A part of the difference may come from elsewhere, such as a bias that is computed from the queries. A number per
    query may be added too: it does not change the softmax, and `log_softmax` adds one.

    Args:
        products: (2, H, Q, K) products of queries and keys, one entry for each image.
        scores: (2, H, Q, K) inputs of the softmax.
    """
    finite = scores[1].isfinite() & scores[0].isfinite()
    changes = [torch.where(finite, widen(t[1] - t[0]), 0).double() for t in (scores, products)]
    known = finite.sum(-1, keepdim=True).clamp_min(1)
    up_to_a_number = [torch.where(finite, c - c.sum(-1, keepdim=True) / known, 0) for c in changes]
    return _are_a_mix(*changes) or _are_a_mix(*up_to_a_number)


def _are_a_mix(scores: Tensor, products: Tensor) -> bool:
    """Check whether a mix of the heads of (H, Q, K) products explains a part of the (H, Q, K) scores, not by chance.

    The part is small where scores are added up from layer to layer (RealFormer), or beside a strong bias.
    """
    score, p = scores.flatten(1), products.flatten(1)
    mix = score @ p.T @ torch.linalg.pinv(p @ p.T)
    by_chance = p.shape[0] / p.shape[1]
    least = min(max(0.05, 4 * by_chance), 0.5)  # of the variance
    return float((score - mix @ p).square().sum()) <= (1 - least) * float(score.square().sum())
