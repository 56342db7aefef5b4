"""Metrics of global features and prototypes against closed forms and rules written independently, with edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.stats import entropy
from sklearn.decomposition import PCA
from torch import Tensor

from attn_monitor.measure import global_features as G
from attn_monitor.measure.prototypes import assign, evenly_spaced, measure_assignments, prototypes_alike, total


def features(rows: int = 300, channels: int = 48, decay: float = 0.7, seed: int = 0) -> Tensor:
    """Correlated features around a mean: channels of falling variance, rotated."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, channels, generator=draw) * torch.arange(1, channels + 1) ** -decay + 0.3
    return (z @ torch.linalg.qr(torch.randn(channels, channels, generator=draw))[0]).double()


@pytest.mark.parametrize("shape", [(300, 48), (40, 48), (200, 150)])
def test_spectra_equal_numpy_and_scikit_learn(shape: tuple[int, int]) -> None:
    z = features(*shape)
    sigma = np.linalg.svd(z.numpy(), compute_uv=False)
    shares = sigma / sigma.sum() + 1e-7
    found = G.measure_features(z)
    assert G.rankme(z) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    variances = PCA(svd_solver="full").fit(z.numpy()).explained_variance_ratio_  # as reptrix has it
    shares = variances + 1e-7
    assert found["effective_rank"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    index = np.arange(10, min(100, len(variances), len(z) - 1))
    slope = np.polyfit(np.log(index + 1), np.log(variances[index]), 1, w=np.sqrt(1 / (index + 1)))[0]
    assert found["alpha"] == pytest.approx(-slope, rel=1e-5)


def test_closed_forms() -> None:
    """A power law has its exponent, orthogonal features have full rank, and others follow from their definition."""
    rows, channels = 512, 128
    basis = torch.linalg.qr(features(rows, channels) - features(rows, channels).mean(0))[0]
    z = (basis - basis.mean(0)) * torch.arange(
        1, channels + 1
    ) ** -0.75  # standard deviations: variances fall by i^-1.5
    assert G.measure_features(z)["alpha"] == pytest.approx(1.5, rel=2e-2)  # the mean is nearly 0
    eye = torch.eye(64, dtype=torch.float64)
    assert G.rankme(eye) == pytest.approx(64, rel=1e-4)  # RankMe's epsilon
    assert G.mean_cosine(eye) == pytest.approx(0, abs=1e-12)
    assert G.koleo(eye) == pytest.approx(-math.log(math.sqrt(2)))
    assert G.uniformity(eye) == pytest.approx(-4)
    assert G.alignment(eye, -eye) == pytest.approx(4)
    assert G.feature_std(eye) == pytest.approx(math.sqrt(64) * math.sqrt(1 / 64 * (1 - 1 / 64)))


def test_pairs_equal_scipy() -> None:
    z = features()
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    assert G.mean_cosine(z) == pytest.approx(1 - pdist(unit, "cosine").mean(), rel=1e-5)
    assert G.feature_std(z) == pytest.approx(unit.std(0).mean() * math.sqrt(48), rel=1e-5)
    assert G.uniformity(z) == pytest.approx(math.log(np.exp(-2 * pdist(unit, "sqeuclidean")).mean()), rel=1e-5)
    distances = cdist(unit, unit)
    np.fill_diagonal(distances, np.inf)
    assert G.koleo(z) == pytest.approx(-np.log(distances.min(1) + 1e-8).mean(), rel=1e-5)
    other = features(seed=1)
    apart = unit - (other / other.norm(dim=1, keepdim=True)).numpy()
    assert G.alignment(z, other) == pytest.approx((apart**2).sum(1).mean(), rel=1e-5)


def test_collapsed_features() -> None:
    """All rows alike: no spread, one direction; no warning and no error."""
    z = features()[:1].expand(100, -1)
    found = G.measure_features(z)
    assert found["mean_cosine"] == pytest.approx(1)
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)
    assert found["rankme"] == pytest.approx(1, abs=1e-3)
    assert math.isnan(found["effective_rank"])  # there is no variance to have a rank
    assert "alpha" not in found


def test_edge_cases() -> None:
    assert G.measure_features(torch.randn(G.LEAST_SAMPLES - 1, 8)) == {}
    assert G.measure_features(torch.randn(1, 8)) == {}
    assert math.isnan(G.mean_cosine(torch.randn(1, 8)))
    broken = features(64)
    broken[3, 2] = math.nan
    found = G.measure_features(broken)
    assert math.isnan(found["rankme"])
    assert math.isnan(found["mean_cosine"])
    zeros = G.measure_features(torch.zeros(32, 8))
    assert zeros["feature_std"] == 0
    half = G.measure_features(features(64).half())
    assert half["rankme"] == pytest.approx(G.rankme(features(64)), rel=1e-2)


def test_views_compare_different_images() -> None:
    """With two views of each image, one view of each is compared with the others."""
    one, other = features(64), features(64) + 0.01 * features(64, seed=3)
    found = G.measure_features(torch.cat([one, other]), (one, other))
    assert found["mean_cosine"] == pytest.approx(G.mean_cosine(one))
    assert found["koleo"] == pytest.approx(G.koleo(one))
    assert found["alignment"] < 0.01


def outputs(images: int = 200, k: int = 32) -> Tensor:
    return torch.randn(images, k, generator=torch.Generator().manual_seed(5)) * 0.3


def test_assignments_equal_scipy() -> None:
    out, centre = outputs(), 0.1 * torch.arange(32.0) / 32
    valid = torch.arange(200) % 3 != 0
    found = measure_assignments(assign(out, valid, 0.07, centre))
    logits = ((out[valid] - centre) / 0.07).double().numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    images = int(valid.sum())
    assert found["assignment_entropy_mean"] == pytest.approx(entropy(p.mean(0)) / math.log(32), rel=1e-5)
    assert found["assignment_entropy_each"] == pytest.approx(entropy(p, axis=1).mean() / math.log(32), rel=1e-5)
    used = len(set(p.argmax(1).tolist())) / 32
    assert found["prototypes_used"] == pytest.approx(used / (1 - (1 - 1 / 32) ** images), rel=1e-5)
    halves = [assign(out[part], valid[part], 0.07, centre) for part in (slice(0, 90), slice(90, 200))]
    assert measure_assignments(total(halves)) == pytest.approx(found)


def test_extreme_assignments() -> None:
    everything = torch.ones(64, dtype=torch.bool)
    uniform = measure_assignments(assign(torch.zeros(64, 16), everything, 0.1))
    assert uniform["assignment_entropy_each"] == pytest.approx(1)
    assert uniform["assignment_entropy_mean"] == pytest.approx(1)
    one_hot = measure_assignments(assign(torch.eye(16)[[3] * 64] * 100, everything, 0.1))
    assert one_hot["assignment_entropy_mean"] == pytest.approx(0, abs=1e-9)
    assert one_hot["prototypes_used"] == pytest.approx(1 / 16 / (1 - (15 / 16) ** 64))
    each = measure_assignments(assign(torch.eye(16).repeat(4, 1) * 100, everything, 0.1))
    assert each["assignment_entropy_mean"] == pytest.approx(1)
    assert each["assignment_entropy_each"] == pytest.approx(0, abs=1e-9)
    assert measure_assignments(assign(torch.zeros(64, 16), ~everything, 0.1)) == {}
    invalid = assign(torch.tensor([[math.nan] * 16, [0.0] * 16]), torch.tensor([False, True]), 0.1)
    assert measure_assignments(invalid)["assignment_entropy_each"] == pytest.approx(
        1
    )  # NaN of a row that does not count
    nan = measure_assignments(assign(torch.full((4, 16), math.nan), everything[:4], 0.1))
    assert math.isnan(nan["assignment_entropy_each"])


def test_alike_prototypes() -> None:
    rows = torch.eye(40)
    assert prototypes_alike(rows) == 0
    rows[1] = rows[0] * 5 + 0.1 * rows[2]  # in nearly the same direction
    assert prototypes_alike(rows) == pytest.approx(2 / 40)
    assert math.isnan(prototypes_alike(rows[:1]))
    rows[4, 4] = math.nan
    assert math.isnan(prototypes_alike(rows))
    assert len(evenly_spaced(torch.zeros(5000, 1), 2048)) <= 2048
