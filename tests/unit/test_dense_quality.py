"""The terms of DSE against scikit-learn and NumPy, and what they say of tokens whose quality is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from attn_monitor.measure import dense_quality as dq
from attn_monitor.measure.dense_quality import dense_quality, kmeans, principal_start

GRID = (7, 5)


def tokens(images: int, *, apart: float = 1.0, noise: float = 0.4, channels: int = 20) -> Tensor:
    """Unit tokens of five kinds."""
    kinds = apart * torch.randn(5, channels)
    kind = torch.randint(0, 5, (images, math.prod(GRID)))
    x = 1 + kinds[kind] + noise * torch.randn(images, math.prod(GRID), channels)
    return (x / x.norm(dim=-1, keepdim=True)).half()


@pytest.mark.parametrize(("points", "clusters"), [(400, 24), (60, 3), (30, 30)])
def test_clusters_are_those_of_scikit_learn(points: int, clusters: int) -> None:
    x = tokens(points // 30 + 1).double().flatten(0, 1)[:points]
    start = principal_start(x, clusters)
    centroids, labels = kmeans(x, start)
    reference = KMeans(clusters, init=start.numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x.numpy())
    assert np.array_equal(labels.numpy(), reference.labels_)
    np.testing.assert_allclose(centroids, reference.cluster_centers_, atol=1e-12)


def test_the_start_is_about_as_good_as_the_best_of_many() -> None:
    x = tokens(8).double()
    start = torch.cat([kmeans(image, principal_start(image, 3))[0] for image in x])
    centroids, labels = kmeans(x.flatten(0, 1), start)
    left = float((x.flatten(0, 1) - centroids[labels]).square().sum())
    assert left < 1.1 * KMeans(24, n_init=10, random_state=0).fit(x.flatten(0, 1).numpy()).inertia_


def spread(points: np.ndarray, labels: np.ndarray) -> list[float]:
    clusters = [points[labels == k] for k in np.unique(labels)]
    return [
        np.linalg.norm(c - c.mean(0), "nuc") / math.sqrt(max(len(c) - 1, c.shape[1])) for c in clusters if len(c) > 1
    ]


def expected(x: np.ndarray) -> tuple[float, float]:
    """Separability and spread, written anew with NumPy and scikit-learn's clusters from the same start."""
    unit = np.linalg.norm(x - x.mean((0, 1)), axis=-1).mean()
    apart, of_images, of_groups = [], [], []
    for group in (x[i : i + 8] for i in range(0, len(x), 8)):
        starts = []
        for image in group:
            start = principal_start(torch.from_numpy(image), 3).numpy()
            found = KMeans(3, init=start, n_init=1, tol=0).fit(image)
            starts.append(found.cluster_centers_)
            of_images += spread(image, found.labels_)
        points = group.reshape(-1, x.shape[-1])
        found = KMeans(3 * len(group), init=np.concatenate(starts), n_init=1, tol=0).fit(points)
        of_groups += spread(points, found.labels_)
        others = np.linalg.norm(points[:, None] - found.cluster_centers_, axis=-1)
        others[np.arange(len(points)), found.labels_] = np.inf
        apart.append(others.min(1).mean())
    return np.mean(apart) / unit, (np.mean(of_images) + np.mean(of_groups)) / 2 / unit


@pytest.mark.parametrize("images", [1, 8, 11])
def test_against_numpy(images: int) -> None:
    x = tokens(images)
    found = dense_quality(x, GRID)
    separability, spread = expected(x.double().numpy())
    assert found["dense_separability"] == pytest.approx(separability, rel=1e-9)
    assert found["dense_spread"] == pytest.approx(spread, rel=1e-7)
    assert dense_quality(x, GRID) == found  # nothing is random


def test_rank() -> None:
    """Of tokens that are the same in an image, where the order of tokens is of no matter."""
    image = tokens(6)[:, :1].double()
    values = np.linalg.svd(image[:, 0].numpy(), compute_uv=False)
    shares = values / values.sum()
    rank = float(np.exp(-(shares * np.log(shares)).sum())) / 6
    assert dense_quality(image.half().expand(-1, 35, -1), GRID)["dense_rank"] == pytest.approx(rank, rel=1e-6)
    assert dense_quality(torch.eye(8).half()[:, None].expand(-1, 35, -1), GRID)["dense_rank"] == pytest.approx(1)
    same = torch.ones(8, 35, 4).half() / 2
    assert dense_quality(same, GRID)["dense_rank"] == pytest.approx(1 / 4, rel=1e-3)


def test_better_tokens_have_better_terms() -> None:
    """Clusters that are blurred lie nearer to each other and are wider."""
    torch.manual_seed(0)
    clear, blurred = (dense_quality(tokens(8, noise=noise), GRID) for noise in (0.2, 1.0))
    assert clear["dense_spread"] < 0.6 * blurred["dense_spread"]
    few = dense_quality(tokens(8, channels=20) * (torch.arange(20) < 2), GRID)
    assert few["dense_rank"] < 0.5 * blurred["dense_rank"]


def test_turned_tokens_have_the_same_terms() -> None:
    x = tokens(4).double()
    turn, _ = torch.linalg.qr(torch.randn(20, 20).double())
    assert dense_quality(x @ turn, GRID) == pytest.approx(dense_quality(x, GRID), rel=1e-9)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_what_cannot_be_measured_is_missing(damage: float) -> None:
    x = tokens(2)
    x[0, 3, 1] = damage
    assert all(map(math.isnan, dense_quality(x, GRID).values()))
    collapsed = dense_quality(tokens(1)[:, :1].expand(2, 35, -1), GRID)
    assert math.isnan(collapsed["dense_separability"])
    assert math.isnan(collapsed["dense_spread"])


@pytest.mark.parametrize(("grid", "channels"), [((1, 1), 4), ((1, 2), 4), ((2, 2), 1)])
def test_few_patches(grid: tuple[int, int], channels: int) -> None:
    found = dense_quality(torch.randn(2, math.prod(grid), channels), grid)
    assert all(map(math.isfinite, found.values()))


def test_large_grids_are_read_evenly() -> None:
    """By rows and columns, so that no stride falls on the same columns."""
    grid, places = (37, 20), torch.arange(37 * 20).view(1, -1, 1)
    read = dq.evenly_spaced(places, grid)[0, :, 0]
    assert len(read) == 16 * 16
    assert (read.min(), read.max()) == (0, 37 * 20 - 1)
    assert len((read % 20).unique()) == 16
