"""Outlier patches of a layer: tokens that hold no part of the image worth seeing, and attention without them.

Vision transformers make tokens of dull patches into scratch space; they draw attention that says nothing of the image.
Source: Darcet et al. 2023, arXiv 2309.16588.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.attention import LayerAttention
from attn_monitor.grid import Grid

CUTOFF = 6.0
"""Robust standard deviations above the median from which on a patch is an outlier."""
LEAST_RATIO = 2.0
"""To the median: where patches are all alike, ordinary ones are many deviations away."""


@dataclass(frozen=True)
class Outliers:
    """Outlier patches of one layer.

    ``patches`` is bool (B, gh, gw). ``ratios`` (B, gh, gw) are to the median of an image's patches, of the ``quantity``
    "token norm" or "attention received".
    """

    patches: Tensor
    ratios: Tensor
    quantity: str

    def reasons(self, image: int) -> Iterator[str]:
        """A line for each outlier of an image: where it is, and why it is one."""
        for row, col in self.patches[image].nonzero().tolist():
            ratio = float(self.ratios[image, row, col])
            yield f"patch ({row}, {col}): {self.quantity} {ratio:.1f} times the median"


def outliers_by_norm(attention: LayerAttention) -> Outliers | None:
    """By the norms of the tokens that enter the layer's block; None where they are not known."""
    if attention.norms is None:
        return None
    norms = attention.norms[:, attention.num_prefix :]  # (B, N)
    return _outliers(norms, F.outliers(norms, CUTOFF), attention.grid, "token norm")


def outliers_by_attention(received: LayerAttention) -> Outliers:
    """By the attention that patches receive from all tokens: ``received`` was recorded with query="mean".

    Its logarithm is looked at, as weights differ by factors. Where some are negative, nothing is an outlier.
    """
    weights = received.maps.mean(1).flatten(1)  # (B, N)
    return _outliers(weights, F.outliers(weights.log(), CUTOFF), received.grid, "attention received")


def _outliers(values: Tensor, far: Tensor, grid: Grid, quantity: str) -> Outliers:
    ratios = values / values.quantile(0.5, -1, keepdim=True)
    patches = far & (ratios >= LEAST_RATIO)
    return Outliers(patches.unflatten(-1, grid), ratios.unflatten(-1, grid), quantity)


def without_patches(attention: LayerAttention, patches: Tensor) -> LayerAttention:
    """The attention as if the softmax had never seen some patches, bool (B, gh, gw): 0 there, and the rest scaled up.

    Rows keep their sums. Weights of which some are negative are not scaled.
    """
    left_out = torch.zeros_like(attention.rows, dtype=torch.bool)
    left_out[..., attention.num_prefix :] = patches.flatten(1)[:, None].to(left_out.device)
    rest = attention.rows.masked_fill(left_out, 0)
    if attention.kind != "signed":
        rest = rest * attention.rows.sum(-1, keepdim=True) / rest.sum(-1, keepdim=True).clamp_min(1e-12)
    return replace(attention, rows=rest)
