"""Outlier patches of a layer, and its attention without them.

Vision transformers use the tokens of uniform patches as scratch space; the attention on these says nothing about the
image. Source: Darcet et al. 2023, arXiv 2309.16588.
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
"""Distance above the median, in robust standard deviations, from which on a patch is an outlier."""
LEAST_RATIO = 2.0
"""Smallest ratio of an outlier to the median: where patches are alike, ordinary ones are many deviations away."""


@dataclass(frozen=True)
class Outliers:
    """Outlier patches of one layer.

    Args:
        patches: The outliers, bool (B, gh, gw).
        ratios: Each patch's quantity divided by the median of its image, (B, gh, gw).
        quantity: "token norm" or "attention received".
    """

    patches: Tensor
    ratios: Tensor
    quantity: str

    def reasons(self, image: int) -> Iterator[str]:
        """Yield a line for each outlier of an image, with its place and its ratio to the median."""
        for row, col in self.patches[image].nonzero().tolist():
            ratio = float(self.ratios[image, row, col])
            yield f"patch ({row}, {col}): {self.quantity} {ratio:.1f} times the median"


def outliers_by_norm(attention: LayerAttention) -> Outliers | None:
    """Find outliers by the norms of the tokens that enter the layer's block; None if these are unknown."""
    if attention.norms is None:
        return None
    norms = attention.norms[:, attention.num_prefix :]  # (B, N)
    return _outliers(norms, F.outliers(norms, CUTOFF), attention.grid, "token norm")


def outliers_by_attention(received: LayerAttention) -> Outliers:
    """Find outliers by the logarithm of the attention that patches receive from all tokens.

    Args:
        received: Attention recorded with query="mean". Where some of it is negative, nothing is an outlier.
    """
    weights = received.maps.mean(1).flatten(1)  # (B, N)
    return _outliers(weights, F.outliers(weights.log(), CUTOFF), received.grid, "attention received")


def _outliers(values: Tensor, far: Tensor, grid: Grid, quantity: str) -> Outliers:
    ratios = values / values.quantile(0.5, -1, keepdim=True)
    patches = far & (ratios >= LEAST_RATIO)
    return Outliers(patches.unflatten(-1, grid), ratios.unflatten(-1, grid), quantity)


def without_patches(attention: LayerAttention, patches: Tensor) -> LayerAttention:
    """Set the attention on ``patches``, bool (B, gh, gw), to 0 and scale the rest up to the row's sum.

    This is what the softmax would give without these patches. Signed weights are not scaled.
    """
    left_out = torch.zeros_like(attention.rows, dtype=torch.bool)
    left_out[..., attention.num_prefix :] = patches.flatten(1)[:, None].to(left_out.device)
    rest = attention.rows.masked_fill(left_out, 0)
    if attention.kind != "signed":
        rest = rest * attention.rows.sum(-1, keepdim=True) / rest.sum(-1, keepdim=True).clamp_min(1e-12)
    return replace(attention, rows=rest)
