"""Numbers on global features: whether a backbone's answers for different images still differ, and in how many ways.

``z`` is (S, D), one row for each of S images, as the backbone returns it. All functions compute in float64 and return
NaN where a row holds NaN or infinity, or where there are too few rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-7  # added to each share of a spectrum, as in RankMe
FIRST, LAST = 10, 100  # indices of the eigenvalues that alpha is fitted to, the last excluded
LEAST_FITTED = 10  # eigenvalues
NEIGHBOURS = 1024  # rows that KoLeo's term compares with one another
LEAST_SAMPLES = 16  # rows; statistics of fewer say nothing


def measure_features(z: Tensor, views: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
    """Compute all metrics of a buffer of global features.

    Args:
        z: Features, (S, D), in any precision.
        views: Features of two views of the same images, each (P, D); None if it is not known which rows these are. The
            first alone is compared with itself where different images are meant.

    Returns:
        Values by name; a metric that is not defined for so few rows or channels is missing.

    Example:
        >>> z = torch.eye(16)
        >>> {name: round(value, 2) for name, value in measure_features(z).items()}["mean_cosine"]
        0.0
    """
    if z.ndim != 2 or len(z) < LEAST_SAMPLES or z.shape[1] < 2:
        return {}
    z = different = z.detach().cpu().double()
    found = {"feature_samples": float(len(z)), "feature_std": feature_std(z)}
    variances = _eigenvalues(z - z.mean(0))
    found |= {"rankme": rankme(z), "effective_rank": effective_rank(variances)}
    if math.isfinite(fitted := alpha(variances[: len(z) - 1])):
        found["alpha"] = fitted
    if views is not None and len(views[0]) >= LEAST_SAMPLES:
        different, other = (view.detach().cpu().double() for view in views)
        found |= {"alignment": alignment(different, other), "uniformity": uniformity(different[-NEIGHBOURS:])}
    return {**found, "mean_cosine": mean_cosine(different), "koleo": koleo(different[-NEIGHBOURS:])}


def feature_std(z: Tensor) -> float:
    """Mean over channels of the standard deviation of features at unit length, times √D.

    Returns:
        0 if all features are alike … about 1 if they are isotropic. Source: SimSiam, arXiv 2011.10566.
    """
    return float(_unit(z).std(0, correction=0).mean() * math.sqrt(z.shape[1]))


def mean_cosine(z: Tensor) -> float:
    """Mean cosine between the features of different rows, -1 to 1; it goes to 1 in a complete collapse."""
    unit, count = _unit(z), len(z)
    if count < 2:
        return math.nan
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1)))


def rankme(z: Tensor) -> float:
    """RankMe: the exponential of the entropy of the singular values of ``z``, which is not centred.

    Returns:
        1 (one direction) … min(S, D). Source: Garrido et al. 2023, arXiv 2210.02885.
    """
    return _spread(_eigenvalues(z).sqrt())


def effective_rank(variances: Tensor) -> float:
    """Exponential of the entropy of the variances along the principal axes, as shares of their sum.

    Unlike `rankme` it is of centred features, so that a large mean does not hide that they vary in a few directions.

    Returns:
        1 (one direction) … min(S, D). The package `reptrix` calls it RankMe.
    """
    return _spread(variances)


def alpha(variances: Tensor) -> float:
    """Exponent of the decay of the variances along the principal axes, λᵢ ~ i^-alpha, fitted from 11th to 100th.

    Returns:
        Above 0; about 1 in good representations. NaN with fewer than 20 variances above 0. Source: α-ReQ, Agrawal et
        al. 2022, and its package `reptrix`, where each one counts with weight 1 / i.
    """
    values = variances[:LAST]
    if len(values) < FIRST + LEAST_FITTED or not bool((values > 0).all()):
        return math.nan
    order = torch.arange(FIRST + 1, len(values) + 1, dtype=torch.float64, device="cpu")
    x, y, weight = -order.log(), values[FIRST:].log(), 1 / order
    x = x - (weight * x).sum() / weight.sum()
    return float((weight * x * y).sum() / (weight * x * x).sum())


def alignment(one: Tensor, other: Tensor) -> float:
    """Mean squared distance between two views of the same images at unit length, 0 (equal) … 4.

    Source: Wang and Isola 2020, arXiv 2005.10242.
    """
    return float((_unit(one) - _unit(other)).square().sum(1).mean())


def uniformity(z: Tensor) -> float:
    """Logarithm of the mean of exp(-2 · squared distance) over pairs of different rows at unit length.

    Returns:
        0 (all alike) … -4 (spread over the sphere). Source: Wang and Isola 2020, arXiv 2005.10242.
    """
    unit, count = _unit(z), len(z)
    if count < 2:
        return math.nan
    distances = (2 - 2 * (unit @ unit.T)).clamp(min=0)
    total = (-2 * distances).exp().sum() - (-2 * distances.diagonal()).exp().sum()
    return float((total / (count * (count - 1))).log())


def koleo(z: Tensor) -> float:
    """KoLeo's term: minus the mean logarithm of each row's distance to its nearest neighbour, at unit length.

    Returns:
        About -ln √2 for orthogonal rows; it grows as rows come together. Source: Sablayrolles et al. 2019,
        arXiv 1806.03198, as DINOv2 has it.
    """
    unit = _unit(z)
    if len(z) < 2:
        return math.nan
    cosines = (unit @ unit.T).fill_diagonal_(-1)
    nearest = (unit - unit[cosines.argmax(1)]).norm(dim=1)
    return float(-(nearest + 1e-8).log().mean())


def _unit(z: Tensor) -> Tensor:
    """Scale rows to length 1; rows of zeros stay."""
    unit: Tensor = z / z.norm(dim=1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    return unit


def _eigenvalues(z: Tensor) -> Tensor:
    """Return the min(S, D) eigenvalues of zᵀz, the largest first; what rounding leaves of a zero is 0."""
    gram = z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T
    if not bool(gram.isfinite().all()):
        return torch.full((min(z.shape),), torch.nan, dtype=z.dtype, device="cpu")
    values = torch.linalg.eigvalsh(gram).flip(0)
    return torch.where(values > max(z.shape) * torch.finfo(z.dtype).eps * values[:1], values, 0)


def _spread(values: Tensor) -> float:
    """Exponential of the entropy of values as shares of their sum; NaN if all are 0."""
    shares = values / values.sum() + EPSILON
    return float((-(shares * shares.log()).sum()).exp())
