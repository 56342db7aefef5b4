"""Scores of a run's checkpoints, the rule that picks some of them, and how far a score is above noise.

Source of the score and of the rule: DSE, Dai et al. 2025, arXiv 2510.17299.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]

WINDOW = 2  # neighbours on each side that a local maximum is not below
PICKS = 3
FEWEST = 5  # checkpoints, one whole window


def dense_scores(separability: Sequence[float], spread: Sequence[float], rank: Sequence[float]) -> Numbers:
    """Score checkpoints for dense tasks by `measure.dense_quality`'s terms: separability - spread, and rank.

    The two are scaled by their standard deviation over the run and added, so that a score compares checkpoints of one
    run and no two runs. A term that does not vary counts nothing.

    Args:
        separability: One value a checkpoint.
        spread: Likewise.
        rank: Likewise.

    Returns:
        Scores, (n,), without a unit; NaN where a value is missing.

    Example:
        >>> int(dense_scores([1.0, 1.2, 1.1], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]).argmax())
        1
    """
    tight = np.asarray(separability, float) - np.asarray(spread, float)
    return _scaled(tight) + _scaled(np.asarray(rank, float))


def _scaled(values: Numbers) -> Numbers:
    known = values[np.isfinite(values)]
    deviation = known.std() if len(known) else 0.0
    level = known.mean() if len(known) else 0.0
    # What is left of equal numbers by rounding is no deviation.
    return (values - level) / deviation if deviation > 1e-9 * max(1.0, abs(level)) else values * 0


def local_maxima(scores: Sequence[float] | Numbers) -> list[int]:
    """Return the highest ``PICKS`` local maxima, the best first: none of the two neighbours on each side is higher.

    Args:
        scores: One a checkpoint, in order of steps; without NaN.

    Example:
        >>> local_maxima([0, 3, 1, 0, 0, 2, 5])
        [6, 1]
    """
    values = np.asarray(scores, float)
    tops = [i for i in range(len(values)) if values[i] == values[max(0, i - WINDOW) : i + WINDOW + 1].max()]
    return sorted(tops, key=lambda i: (-values[i], i))[:PICKS]


def neighbour_noise(steps: Sequence[int], scores: Sequence[float] | Numbers) -> float:
    """Estimate the standard deviation of scores around their course over steps.

    Each score is compared with the line between its two neighbours; the median of these distances is robust against a
    few leaps.

    Args:
        steps: Of the checkpoints, ascending.
        scores: Likewise; without NaN.

    Returns:
        The deviation in units of the score, NaN for fewer than three.

    Example:
        >>> neighbour_noise([0, 10, 20, 30], [1.0, 2.0, 3.0, 4.0])
        0.0
    """
    x, y = np.asarray(steps, float), np.asarray(scores, float)
    if len(x) < 3:
        return float("nan")
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    apart = y[1:-1] - (1 - share) * y[:-2] - share * y[2:]
    return float(1.4826 * np.median(np.abs(apart) / np.sqrt(1 + share**2 + (1 - share) ** 2)))
