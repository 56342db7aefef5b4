"""The score of DSE, its rule of picks, and the noise between neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from attn_monitor.measure.checkpoint_scores import dense_scores, local_maxima, neighbour_noise


def test_the_score_orders_as_the_paper_weights_it() -> None:
    """M_inter - M_intra + λ M_dim with λ the ratio of the standard deviations, but for a scale and a constant."""
    draw = np.random.default_rng(0)
    inter, intra, dim = draw.normal(1, 0.1, 30), draw.normal(0.5, 0.2, 30), draw.normal(0.4, 0.01, 30)
    weight = np.std(inter - intra) / np.std(dim)
    paper = inter - intra + weight * dim
    scores = dense_scores(inter, intra, dim)
    assert np.corrcoef(scores, paper)[0, 1] == pytest.approx(1)
    assert np.ptp(scores) == pytest.approx(np.ptp(paper) / np.std(inter - intra))


def test_a_term_that_does_not_vary_counts_nothing() -> None:
    assert list(dense_scores([1, 2, 3], [0, 0, 0], [0.3, 0.3, 0.3 + 1e-12]).round(2)) == [-1.22, 0, 1.22]
    assert list(dense_scores([1, 1], [1, 1], [1, 1])) == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_local_maxima_by_the_rule_written_anew(seed: int) -> None:
    scores = list(np.random.default_rng(seed).integers(0, 6, 25))
    tops = [i for i in range(25) if not any(scores[j] > scores[i] for j in range(25) if 0 < abs(i - j) <= 2)]
    found = local_maxima(scores)
    assert set(found) <= set(tops)
    assert len(found) == min(3, len(tops))
    assert min(scores[i] for i in found) >= max((scores[i] for i in set(tops) - set(found)), default=-1)


def test_noise_is_that_around_the_course() -> None:
    draw, steps = np.random.default_rng(0), np.cumsum(np.random.default_rng(1).integers(1, 9, 4000))
    course = np.sin(steps / 4000)
    assert neighbour_noise(steps, course + 0.2 * draw.normal(size=4000)) == pytest.approx(0.2, rel=0.05)
    assert np.isnan(neighbour_noise([0, 1], [0.0, 1.0]))
