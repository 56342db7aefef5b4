"""`thin`: choose a few of many steps, evenly spaced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def thin(steps: Sequence[int], count: int) -> list[int]:
    """Choose at most ``count`` indices of ascending ``steps``, spread evenly, with the first and the last.

    Example:
        >>> thin([0, 1, 2, 50, 100], 3)
        [0, 3, 4]
    """
    if len(steps) <= count:
        return list(range(len(steps)))
    goals = np.linspace(steps[0], steps[-1], count)
    return sorted({int(np.abs(np.asarray(steps) - goal).argmin()) for goal in goals})
