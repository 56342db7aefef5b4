"""What patch tokens are worth for dense tasks, without labels: the terms of DSE.

DSE (Dai et al. 2025, arXiv 2510.17299) asks whether clusters of patches lie apart (`dense_separability`) and are tight
(`dense_spread`), and whether the tokens fill their dimensions (`dense_rank`). `commands.pick` makes one score of them.
Nothing here is random: clusters start from the features themselves, so that the same tokens give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.grid import Grid
from attn_monitor.measurements import MetricKey, Metrics

SEPARABILITY, SPREAD, RANK = "dense_separability", "dense_spread", "dense_rank"
DENSE = (SEPARABILITY, SPREAD, RANK)
"""Values of the metric "dense"."""

CLUSTERS = 3  # of each image: 24 in a group of eight
GROUP = 8  # images that are clustered together
SIDE = 16  # rows and columns of patches of an image that are read, evenly spaced
ITERATIONS = 50
ROUNDING = 1e-3  # of a token's length: tokens are float16, and closer ones are the same


def dense_metrics(layers: Mapping[tuple[str, int], LayerAttention]) -> Metrics:
    """Compute `dense_quality` of each layer that has patch tokens."""
    return Metrics(
        {
            MetricKey(role, layer, name): value
            for (role, layer), attention in layers.items()
            if attention.patches is not None
            for name, value in dense_quality(attention.patches, attention.grid).items()
        }
    )


@torch.no_grad()
def dense_quality(patches: Tensor, grid: Grid | tuple[int, ...]) -> dict[str, float]:
    """Compute the terms of DSE of one layer, on the host.

    Distances are in units of the mean distance of a token to the mean of all. There are 3 clusters in each image, and
    3 for each image of a group of eight.

    Args:
        patches: Patch tokens at unit length, (B, N, D).
        grid: (gh, gw) of the patches; at most 16 rows and columns, evenly spaced, are read, and as many tokens on
            other grids.

    Returns:
        ``dense_separability``: mean distance of a token to the nearest centroid of another cluster of its group, at
        least 0. ``dense_spread``: mean over clusters of the nuclear norm of a cluster around its mean, over
        √max(n - 1, D), averaged over clusters of images and of groups, at least 0. ``dense_rank``: effective rank of
        one token of each image over min(B, D), 0 to 1, averaged over tokens. NaN where a token is not finite; the
        first two also where all tokens are the same.

    Example:
        >>> tokens = torch.eye(4).repeat(1, 4, 1)  # 16 patches of four kinds
        >>> {name: round(value, 3) for name, value in dense_quality(tokens, (4, 4)).items()}
        {'dense_separability': 1.524, 'dense_spread': 0.291, 'dense_rank': 1.0}
    """
    tokens = evenly_spaced(patches, grid).double().cpu()  # (B, n, D)
    if not tokens.isfinite().all():
        return dict.fromkeys(DENSE, math.nan)
    found = {SEPARABILITY: math.nan, SPREAD: math.nan, RANK: _rank(tokens)}
    unit = float(torch.linalg.vector_norm(tokens - tokens.mean((0, 1)), dim=-1).mean())
    if unit > ROUNDING:
        clustered = [_clustered(group) for group in tokens.split(GROUP)]
        apart, of_images, of_groups = zip(*clustered, strict=True)
        spreads = [torch.cat(spread).mean() for spread in (of_images, of_groups)]
        found[SEPARABILITY] = float(torch.stack(apart).mean()) / unit
        found[SPREAD] = float(torch.stack(spreads).mean()) / unit
    return found


def evenly_spaced(patches: Tensor, grid: Grid | tuple[int, ...]) -> Tensor:
    """Choose at most `SIDE` rows and columns of patches (B, N, D): (B, n, D)."""
    side = round(SIDE ** (2 / len(grid)))
    chosen: Tensor = patches.unflatten(1, tuple(grid))
    for axis, lines in enumerate(grid, 1):
        few = torch.linspace(0, lines - 1, min(lines, side), device="cpu").round().long().to(patches.device)
        chosen = chosen.index_select(axis, few)
    chosen = chosen.flatten(1, len(grid))
    return chosen


def _clustered(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a group's mean distance to other clusters, and the spreads of clusters of its images and of itself."""
    together, count = tokens.flatten(0, 1), min(CLUSTERS, tokens.shape[1])
    of_images = [kmeans(image, principal_start(image, count)) for image in tokens]
    centroids, labels = kmeans(together, torch.cat([centroids for centroids, _ in of_images]))
    distances = torch.cdist(together, centroids).scatter(1, labels[:, None], math.inf)
    there = labels.bincount(minlength=len(centroids)) > 0
    apart = distances[:, there].amin(1).mean() if there.sum() > 1 else distances.new_zeros(())
    spreads = [spread for image, (_, own) in zip(tokens, of_images, strict=True) for spread in _spreads(image, own)]
    of_group = _spreads(together, labels)
    return apart, apart.new_tensor(spreads or [0.0]), apart.new_tensor(of_group or [0.0])


def principal_start(points: Tensor, count: int) -> Tensor:
    """Means of ``count`` equal parts of points (n, D), in order of their scores on the leading principal axis."""
    centred = points - points.mean(0)
    wide = points.shape[1] > len(points)
    axis = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred).eigenvectors[:, -1]
    order = (axis if wide else centred @ axis).argsort(stable=True)
    return torch.stack([points[part].mean(0) for part in order.tensor_split(count)])


def kmeans(points: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster by Lloyd's algorithm, until nothing changes or ``ITERATIONS`` are done.

    Args:
        points: (n, D).
        start: First centroids, (k, D). One that no point is nearest to goes to the point that is farthest from its own.

    Returns:
        Centroids, (k, D), and the cluster of each point, (n,) from 0 on.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [5.0], [7.0]])
        >>> centroids, labels = kmeans(points, points[:2])
        >>> centroids.flatten().tolist(), labels.tolist()
        ([0.5, 6.0], [0, 0, 1, 1])
    """
    centroids, labels = start, torch.full((len(points),), -1, device=points.device)
    for _ in range(ITERATIONS):
        # The nearest by |c|² - 2 x·c, as |x|² is the same for all.
        nearest = torch.addmm(centroids.square().sum(1), points, centroids.T, alpha=-2).argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        owners, empty = labels.clone(), labels.bincount(minlength=len(centroids)) == 0
        if empty.any():
            farthest = torch.linalg.vector_norm(points - centroids[labels], dim=1).topk(int(empty.sum()))
            owners[farthest.indices[farthest.values > 0]] = empty.nonzero()[farthest.values > 0, 0]
        size = owners.bincount(minlength=len(centroids))[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, owners, points)
        centroids = torch.where(size > 0, sums / size.clamp_min(1), centroids)
    return centroids, labels


def _spreads(points: Tensor, labels: Tensor) -> list[float]:
    """Return each cluster's nuclear norm around its mean over √max(n - 1, D), for clusters of at least two points."""
    clusters = [points[labels == label] for label in labels.unique()]
    return [
        float(_singular_values(c - c.mean(0)).sum()) / math.sqrt(max(len(c) - 1, c.shape[1]))
        for c in clusters
        if len(c) > 1
    ]


def _singular_values(points: Tensor) -> Tensor:
    """Return the singular values of (…, n, D) in float64, by the smaller of the two products with itself."""
    gram = points @ points.mT if points.shape[-1] > points.shape[-2] else points.mT @ points
    values: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return values


def _rank(tokens: Tensor) -> float:
    """Return the mean effective rank of one token of each image over min(B, D).

    In each image the tokens are taken in another order, the same at each call, so that they are of other places.
    """
    draw = torch.Generator("cpu").manual_seed(0)
    order = torch.stack([torch.randperm(tokens.shape[1], generator=draw, device="cpu") for _ in tokens])
    shuffled = tokens.gather(1, order[..., None].expand_as(tokens)).transpose(0, 1)  # (n, B, D)
    values = _singular_values(shuffled)
    shares = values / values.sum(-1, keepdim=True).clamp_min(1e-12)
    return float(torch.special.entr(shares).sum(-1).exp().mean()) / min(len(tokens), tokens.shape[-1])
