"""A sweep loses no case and no mark."""

from __future__ import annotations

import pytest

from tests.support.tiers import sweep


def test_all_but_the_first_cases_are_slow_and_none_is_lost() -> None:
    marked = pytest.param("c", id="third", marks=pytest.mark.skip)
    params = sweep(["a", ("b", 2), marked, "d"], quick=1)
    assert [param.values for param in params] == [("a",), ("b", 2), ("c",), ("d",)]
    assert [[mark.name for mark in param.marks] for param in params] == [[], ["slow"], ["skip", "slow"], ["slow"]]
    assert params[2].id == "third"
