"""Pure functions on attention tensors: entropy, mass mask, divergences, overlap, outliers, drift and distance.

``p`` is attention over patches, (..., N), and is renormalised to sum 1. All functions compute in float32 (float64 for
float64 input), with natural logarithms; NaN in the input gives NaN in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_DEVICES = [device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)]


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable autocast and set the default dtype to float32 within this context, whatever a training loop has set."""
    default, cast = torch.get_default_dtype(), [d for d in _DEVICES if torch.is_autocast_enabled(d)]
    torch.set_default_dtype(torch.float32)
    for device in cast:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        for device in cast:
            torch.set_autocast_enabled(device, True)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def normalise(p: Tensor) -> Tensor:
    """Scale weights to sum 1 over the last dimension.

    Args:
        p: Weights, (..., N).

    Returns:
        Shares, (..., N). Weights that are all 0 become uniform; where a weight is negative, all shares are NaN.

    Example:
        >>> normalise(torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    p = _float(p)
    total = p.sum(-1, keepdim=True)
    shares = torch.where(total == 0, torch.full_like(p, 1 / p.shape[-1]), p / total)
    return torch.where((p < 0).any(-1, keepdim=True), torch.nan, shares)


def entropy(p: Tensor) -> Tensor:
    """Entropy of attention over patches, divided by ln N. It falls from 1 as attention forms.

    Source: attention entropy of Zhai et al. 2023, arXiv 2303.06296.

    Args:
        p: Attention, (..., N).

    Returns:
        Entropy, (...), from 0 (one patch has it all) to 1 (uniform); 0 for N = 1.

    Example:
        >>> entropy(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
        tensor([1., 0.])
    """
    if p.shape[-1] == 1:
        return 0 * _float(p)[..., 0]
    p = normalise(p)
    total: Tensor = torch.special.entr(p).sum(-1)
    return total / math.log(p.shape[-1])


def mass_mask(p: Tensor, threshold: float = 0.6) -> Tensor:
    """Smallest set of patches, the largest first, whose attention reaches a threshold.

    The patch that crosses the threshold is kept; among equal patches the last ones are.
    Source: DINO's `visualize_attention.py` (sort ascending, cumulate, keep where the sum exceeds 1 - threshold).

    Args:
        p: Attention, (..., N).
        threshold: Share of the attention to keep, above 0 and up to 1.

    Returns:
        Mask, bool (..., N); all False where ``p`` has NaN.

    Example:
        >>> mass_mask(torch.tensor([0.5, 0.3, 0.1, 0.1]), 0.6)
        tensor([ True,  True, False, False])
    """
    p = normalise(p)
    p = p if p.device.type == "mps" else p.double()  # Apple's GPUs have no float64
    ascending, index = p.sort(dim=-1, stable=True)
    # Sums carry rounding errors of the input's precision; a mass that reaches the threshold but for these counts.
    keep = ascending.cumsum(-1) > 1 - threshold + 1e-6
    mask = torch.zeros_like(keep).scatter(-1, index, keep)
    return mask & p.isfinite().all(-1, keepdim=True)


def mask_area(p: Tensor, threshold: float = 0.6) -> Tensor:
    """Share of patches that `mass_mask` keeps.

    Args:
        p: Attention, (..., N).
        threshold: Share of the attention to keep, above 0 and up to 1.

    Returns:
        Area, (...), 0…1; NaN where ``p`` has NaN.

    Example:
        >>> mask_area(torch.tensor([0.5, 0.3, 0.1, 0.1]), 0.6)
        tensor(0.5000)
    """
    return area_of(mass_mask(p, threshold), p)


def area_of(mask: Tensor, p: Tensor) -> Tensor:
    """Compute `mask_area` of a mask that is known already.

    Args:
        mask: The mass mask of ``p``, bool (..., N).
        p: Attention, (..., N).

    Returns:
        Area, (...), 0…1; NaN where ``p`` has NaN or a negative weight.

    Example:
        >>> area_of(torch.tensor([True, False]), torch.tensor([0.9, 0.1]))
        tensor(0.5000)
    """
    return torch.where((p.isfinite() & (p >= 0)).all(-1), _float(mask).mean(-1), torch.nan)


def peak(p: Tensor) -> Tensor:
    """Largest weight in units of uniform attention.

    Source: the artefact tokens of Darcet et al. 2023, arXiv 2309.16588.

    Args:
        p: Attention, (..., N).

    Returns:
        Peak, (...), from 1 (uniform) to N (one patch has it all).

    Example:
        >>> peak(torch.tensor([0.5, 0.25, 0.25, 0.0]))
        tensor(2.)
    """
    highest: Tensor = normalise(p).amax(-1) * p.shape[-1]
    return highest


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence divided by ln 2.

    Args:
        p: Attention, (..., N).
        q: Attention, (..., N).

    Returns:
        Divergence, (...), from 0 (equal) to 1 (disjoint).

    Example:
        >>> js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(1.)
    """
    p, q = normalise(p), normalise(q)
    mean = (p + q) / 2
    kl: Tensor = 2 * torch.special.entr(mean) - torch.special.entr(p) - torch.special.entr(q)
    return (kl.sum(-1) / 2 / math.log(2)).clamp(0, 1)


def head_divergence(p: Tensor) -> Tensor:
    """Mean `js_divergence` over all pairs of heads.

    Args:
        p: Attention of each head, (..., H, N).

    Returns:
        Divergence, (...), from 0 (all heads alike, or one head) to 1.

    Example:
        >>> head_divergence(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(1.)
    """
    heads = p.shape[-2]
    first, second = torch.triu_indices(heads, heads, offset=1, device=p.device)
    if len(first) == 0:
        return 0 * _float(p).sum((-1, -2))
    return js_divergence(p[..., first, :], p[..., second, :]).mean(-1)


def jaccard(mask: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union.

    Args:
        mask: Bool (..., N).
        truth: Bool (..., N).

    Returns:
        Overlap, (...), 0…1; NaN where both are empty.

    Example:
        >>> jaccard(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        tensor(0.5000)
    """
    both, either = (mask & truth).sum(-1), (mask | truth).sum(-1)
    return torch.where(either > 0, _float(both) / either, torch.nan)


def outliers(norms: Tensor, cutoff: float = 6.0) -> Tensor:
    """Tokens whose norm is far above that of the image's others.

    Far is above the median + cutoff · 1.4826 · MAD (median absolute deviation). Source: the artefact tokens of Darcet
    et al. 2023, arXiv 2309.16588, whose own cut-off of 150 holds for one model.

    Args:
        norms: Token norms, (..., N).
        cutoff: Distance from the median in robust standard deviations.

    Returns:
        Outliers, bool (..., N).

    Example:
        >>> outliers(torch.tensor([1.0, 1.1, 0.9, 9.0]))
        tensor([False, False, False,  True])
    """
    norms = _float(norms)
    median = norms.quantile(0.5, -1, keepdim=True)
    spread = (norms - median).abs().quantile(0.5, -1, keepdim=True)
    return norms > median + cutoff * 1.4826 * spread


def outlier_fraction(norms: Tensor, cutoff: float = 6.0) -> Tensor:
    """Share of `outliers` among patches.

    Args:
        norms: Patch norms, (..., N).
        cutoff: Distance from the median in robust standard deviations.

    Returns:
        Share, (...), 0…1; NaN where a norm is not finite.

    Example:
        >>> outlier_fraction(torch.tensor([1.0, 1.1, 0.9, 9.0]))
        tensor(0.2500)
    """
    return area_of(outliers(norms, cutoff), norms)


def gram_drift(features: Tensor, reference: Tensor) -> Tensor:
    """Root mean square change of the cosines between all pairs of an image's patches.

    It does not depend on the axes of the features. Source: the norm in DINOv3's Gram loss, Siméoni et al. 2025,
    arXiv 2508.10104, over N · (N - 1) pairs.

    Args:
        features: Patch features at unit length, (..., N, K).
        reference: Features of the same patches at another step, (..., N, K).

    Returns:
        Drift, (...), 0…2.

    Example:
        >>> gram_drift(torch.eye(2), torch.eye(2).flip(0))
        tensor(0.)
    """
    now, then = features.double(), reference.double()
    # ‖F Fᵀ - G Gᵀ‖² without any (N, N) matrix: as ‖Fᵀ F‖² + ‖Gᵀ G‖² - 2 ‖Fᵀ G‖².
    squares = [(a.mT @ b).square().sum((-1, -2)) for a, b in ((now, now), (then, then), (now, then))]
    pairs = max(1, features.shape[-2] * (features.shape[-2] - 1))
    return ((squares[0] + squares[1] - 2 * squares[2]).clamp_min(0) / pairs).sqrt().float()


def attention_distance(p: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Mean distance from each query patch to the patches that it attends to.

    Source: Dosovitskiy et al. 2020, arXiv 2010.11929, App. D.7; Raghu et al. 2021, arXiv 2108.08810.

    Args:
        p: Attention of each query patch, (..., Q, N).
        queries: Centres of the query patches, (Q, 2).
        keys: Centres of the key patches, (N, 2).

    Returns:
        Distance, (..., Q), in the unit of the centres: 0 where each patch attends to itself alone.

    Example:
        >>> attention_distance(torch.tensor([[0.5, 0.5]]), torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
        tensor([2.])
    """
    p = normalise(p)
    apart = torch.linalg.vector_norm(queries[:, None].to(p.dtype) - keys[None].to(p.dtype), dim=-1)  # (Q, N)
    total: Tensor = (p * apart).sum(-1)
    return total
