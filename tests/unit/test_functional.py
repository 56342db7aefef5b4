"""Each statistic against an independent oracle, and at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy
from scipy.stats import median_abs_deviation

from attn_monitor import functional as F

weights = hnp.arrays(np.float64, st.integers(2, 40), elements=st.floats(1e-6, 1.0))


@given(weights)
def test_entropy_is_scipys(p: np.ndarray) -> None:
    expected = scipy_entropy(p / p.sum()) / math.log(len(p))
    assert float(F.entropy(torch.from_numpy(p))) == pytest.approx(expected, abs=1e-9)


@given(hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(2, 40)), elements=st.floats(1e-6, 1.0)))
def test_js_divergence_is_scipys(pq: np.ndarray) -> None:
    p, q = pq / pq.sum(1, keepdims=True)
    # Not its jensenshannon, which takes the root of what rounding may make negative.
    expected = (scipy_entropy(p, (p + q) / 2, base=2) + scipy_entropy(q, (p + q) / 2, base=2)) / 2
    got = float(F.js_divergence(torch.from_numpy(pq[0]), torch.from_numpy(pq[1])))
    assert got == pytest.approx(expected, abs=1e-9)


def mask_by_the_papers_words(p: list[float], threshold: float) -> list[bool]:
    """Add patches from the largest down until their mass reaches the threshold."""
    total, kept, mass = sum(p), [False] * len(p), 0.0
    for index in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= threshold - 1e-6:
            break
        kept[index] = True
        mass += p[index] / total
    return kept


@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-4, 1.0), unique=True), st.floats(0.05, 1))
def test_mass_mask_is_the_smallest_set_that_reaches_the_threshold(p: np.ndarray, threshold: float) -> None:
    got = F.mass_mask(torch.from_numpy(p), threshold)
    reached = float(p[got.numpy()].sum() / p.sum())
    assert reached >= threshold - 2e-6
    assert int(got.sum()) == sum(mask_by_the_papers_words(p.tolist(), threshold))
    assert p[got.numpy()].min() >= p[~got.numpy()].max(initial=0) - 1e-9  # normalised, neighbours of float64 are equal


def test_mass_mask_keeps_the_crossing_patch() -> None:
    assert F.mass_mask(torch.tensor([0.5, 0.3, 0.1, 0.1]), 0.6).tolist() == [True, True, False, False]
    assert F.mass_mask(torch.tensor([0.6, 0.4]), 0.6).tolist() == [True, False]
    assert F.mass_mask(torch.tensor([0.1, 0.1, 0.5, 0.3]), 0.8).tolist() == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_edges(dtype: torch.dtype) -> None:
    one_hot, uniform = torch.eye(4, dtype=dtype)[1], torch.full((4,), 0.25, dtype=dtype)
    assert float(F.entropy(one_hot)) == 0
    assert float(F.entropy(uniform)) == pytest.approx(1, abs=1e-6)
    assert float(F.mask_area(one_hot)) == 0.25
    assert float(F.mask_area(uniform)) == 0.75
    assert (float(F.peak(one_hot)), float(F.peak(uniform))) == (4, 1)
    assert float(F.js_divergence(torch.eye(4, dtype=dtype)[0], one_hot)) == 1
    assert float(F.js_divergence(uniform, uniform)) == 0
    assert float(F.head_divergence(torch.stack([one_hot, one_hot]))) == 0
    assert float(F.head_divergence(torch.eye(4, dtype=dtype)[:3])) == pytest.approx(1)
    assert float(F.head_divergence(one_hot[None])) == 0


def test_one_patch_zero_mass_and_missing() -> None:
    one = torch.ones(1)
    assert (float(F.entropy(one)), float(F.mask_area(one)), float(F.peak(one))) == (0, 1, 1)
    nothing = torch.zeros(4)
    assert (float(F.entropy(nothing)), float(F.peak(nothing))) == (1, 1)
    missing = torch.tensor([0.5, math.nan, 0.25, 0.25])
    for value in (F.entropy(missing), F.mask_area(missing), F.peak(missing), F.js_divergence(missing, nothing)):
        assert math.isnan(float(value))
    assert not F.mass_mask(missing).any()


def test_head_divergence_is_the_mean_over_pairs() -> None:
    p = torch.rand(3, 5, 20, dtype=torch.float64)
    pairs = [(a, b) for a in range(5) for b in range(a + 1, 5)]
    for image in range(3):
        expected = np.mean([jensenshannon(p[image, a], p[image, b], base=2) ** 2 for a, b in pairs])
        assert float(F.head_divergence(p)[image]) == pytest.approx(expected)


def test_jaccard() -> None:
    mask, truth = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool()
    assert float(F.jaccard(mask, truth)) == pytest.approx(1 / 3)
    assert math.isnan(float(F.jaccard(mask & False, truth & False)))


@given(hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0.1, 100.0)))
def test_outliers_by_the_median_absolute_deviation(norms: np.ndarray) -> None:
    cutoff = np.median(norms) + 6 * median_abs_deviation(norms, scale=1 / 1.4826)
    got = F.outliers(torch.from_numpy(norms)).numpy()
    clear = np.abs(norms - cutoff) > 1e-9 * cutoff
    np.testing.assert_array_equal(got[clear], (norms > cutoff)[clear])


def test_outlier_edges() -> None:
    assert float(F.outlier_fraction(torch.ones(8))) == 0
    assert float(F.outlier_fraction(torch.tensor([1.0] * 7 + [2.0]))) == 1 / 8  # no spread: any larger norm stands out
    assert float(F.outlier_fraction(torch.ones(1, dtype=torch.float16))) == 0
    assert math.isnan(float(F.outlier_fraction(torch.tensor([1.0, math.nan, 2.0]))))


def test_signed_weights_are_no_distribution() -> None:
    p = torch.tensor([[0.5, 0.7, -0.2], [0.5, 0.25, 0.25]])
    for values in (F.entropy(p), F.mask_area(p), F.peak(p), F.js_divergence(p, p.flip(-1))):
        assert values.isnan().tolist() == [True, False]
    assert not F.mass_mask(p)[0].any()
