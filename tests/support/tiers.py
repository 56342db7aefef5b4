"""Sweeps in two tiers: `make test` runs some cases of each, `make test-slow` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], *, quick: int) -> list[Any]:
    """Mark all cases slow but the first ``quick``; cases are values, tuples of them, or `pytest.param`."""
    params = [c if hasattr(c, "marks") else pytest.param(*(c if isinstance(c, tuple) else (c,))) for c in cases]
    slow = (pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.slow]) for p in params[quick:])
    return [*params[:quick], *slow]
