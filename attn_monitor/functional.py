"""Pure functions on attention tensors. `p` is attention over patches, (..., N), and is renormalised to sum 1.

Everything is computed in float32 (float64 for float64 input), in natural logarithms, and NaN in gives NaN out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def full_precision() -> Iterator[None]:
    """Without autocast and with float32 as the default type, whatever a training loop has set."""
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
    """Scale to sum 1 over the last dimension; all zeros become uniform, the limit of "no preference".

    Weights of which some are negative are no distribution: all NaN.
    """
    p = _float(p)
    total = p.sum(-1, keepdim=True)
    shares = torch.where(total == 0, torch.full_like(p, 1 / p.shape[-1]), p / total)
    return torch.where((p < 0).any(-1, keepdim=True), torch.nan, shares)


def entropy(p: Tensor) -> Tensor:
    """Entropy over patches divided by ln N, (..., N) to (...): 0 one patch, 1 uniform; 0 when N = 1.

    Falls from 1 as attention forms. Source: attention entropy of Zhai et al. 2023, arXiv 2303.06296.
    """
    if p.shape[-1] == 1:
        return 0 * _float(p)[..., 0]
    p = normalise(p)
    total: Tensor = torch.special.entr(p).sum(-1)
    return total / math.log(p.shape[-1])


def mass_mask(p: Tensor, threshold: float = 0.6) -> Tensor:
    """The smallest set of top patches whose mass reaches the threshold, bool (..., N).

    The patch that crosses the threshold is kept: [.5, .3, .1, .1] at 0.6 keeps two; of equal ones the last are. All
    False where p has NaN.
    Source: DINO's `visualize_attention.py` (sort ascending, cumulate, keep where the sum exceeds 1 - threshold).
    """
    p = normalise(p)
    p = p if p.device.type == "mps" else p.double()  # Apple's GPUs have no float64
    ascending, index = p.sort(dim=-1, stable=True)
    # Sums carry rounding errors of the input's precision; a mass that reaches the threshold but for these counts.
    keep = ascending.cumsum(-1) > 1 - threshold + 1e-6
    mask = torch.zeros_like(keep).scatter(-1, index, keep)
    return mask & p.isfinite().all(-1, keepdim=True)


def mask_area(p: Tensor, threshold: float = 0.6) -> Tensor:
    """Share of patches that `mass_mask` keeps, (..., N) to (...): 0…1, NaN where p has NaN."""
    return area_of(mass_mask(p, threshold), p)


def area_of(mask: Tensor, p: Tensor) -> Tensor:
    """`mask_area` of a mask that is there already."""
    return torch.where((p.isfinite() & (p >= 0)).all(-1), _float(mask).mean(-1), torch.nan)


def peak(p: Tensor) -> Tensor:
    """Largest weight in units of uniform attention, (..., N) to (...): 1 uniform … N one patch.

    Source: the artefact tokens of Darcet et al. 2023, arXiv 2309.16588.
    """
    highest: Tensor = normalise(p).amax(-1) * p.shape[-1]
    return highest


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence divided by ln 2, over the last dimension: 0 equal … 1 disjoint."""
    p, q = normalise(p), normalise(q)
    mean = (p + q) / 2
    kl: Tensor = 2 * torch.special.entr(mean) - torch.special.entr(p) - torch.special.entr(q)
    return (kl.sum(-1) / 2 / math.log(2)).clamp(0, 1)


def head_divergence(p: Tensor) -> Tensor:
    """Mean pairwise `js_divergence` between heads, (..., H, N) to (...): 0 all the same … 1; 0 for one head."""
    heads = p.shape[-2]
    first, second = torch.triu_indices(heads, heads, offset=1, device=p.device)
    if len(first) == 0:
        return 0 * _float(p).sum((-1, -2))
    return js_divergence(p[..., first, :], p[..., second, :]).mean(-1)


def jaccard(mask: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of bool masks over the last dimension: 0…1, NaN where both are empty."""
    both, either = (mask & truth).sum(-1), (mask | truth).sum(-1)
    return torch.where(either > 0, _float(both) / either, torch.nan)


def outliers(norms: Tensor, cutoff: float = 6.0) -> Tensor:
    """Which tokens have a norm far above their image's others, bool, over the last dimension of (..., N) norms.

    Far is above the median + cutoff · 1.4826 · MAD (median absolute deviation), so `cutoff` counts robust standard
    deviations. The artefact tokens of Darcet et al. 2023, arXiv 2309.16588, whose own cut-off of 150 is for one model.
    """
    norms = _float(norms)
    median = norms.quantile(0.5, -1, keepdim=True)
    spread = (norms - median).abs().quantile(0.5, -1, keepdim=True)
    return norms > median + cutoff * 1.4826 * spread


def outlier_fraction(norms: Tensor, cutoff: float = 6.0) -> Tensor:
    """Share of `outliers` among (..., N) patch norms: 0…1, NaN where a norm is not finite."""
    return area_of(outliers(norms, cutoff), norms)


def gram_drift(features: Tensor, reference: Tensor) -> Tensor:
    """Root mean square change of the cosines between all pairs of an image's patches, (..., N, K) to (...): 0…2.

    Both are patch features at unit length. 0 where patches still mean to each other what they did, whatever has become
    of the axes. The norm in DINOv3's Gram loss, Siméoni et al. 2025, arXiv 2508.10104, over N · (N - 1) pairs.
    """
    now, then = features.double(), reference.double()
    # ‖F Fᵀ - G Gᵀ‖² without any (N, N) matrix: as ‖Fᵀ F‖² + ‖Gᵀ G‖² - 2 ‖Fᵀ G‖².
    squares = [(a.mT @ b).square().sum((-1, -2)) for a, b in ((now, now), (then, then), (now, then))]
    pairs = max(1, features.shape[-2] * (features.shape[-2] - 1))
    return ((squares[0] + squares[1] - 2 * squares[2]).clamp_min(0) / pairs).sqrt().float()


def attention_distance(p: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Mean distance from each query patch to what it attends to, (..., Q, N) to (..., Q), in the positions' unit.

    ``queries`` (Q, 2) and ``keys`` (N, 2) are patch centres. 0 each patch itself; high for heads that look globally.
    Source: Dosovitskiy et al. 2020, arXiv 2010.11929, App. D.7; Raghu et al. 2021, arXiv 2108.08810.
    """
    p = normalise(p)
    apart = torch.linalg.vector_norm(queries[:, None].to(p.dtype) - keys[None].to(p.dtype), dim=-1)  # (Q, N)
    total: Tensor = (p * apart).sum(-1)
    return total
