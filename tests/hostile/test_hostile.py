"""Hostile models: every map that is accepted is true by place, or refused; those that must be right are right."""

from typing import Any

import pytest

from tests.support.hostile import CASES
from tests.support.hostile_held_out import HELD_OUT
from tests.support.hostile_judge import Hostile, judge
from tests.support.tiers import sweep

FIRST = {case.kind: case for case in reversed(CASES)}
KINDS = sorted(CASES, key=lambda case: case is not FIRST[case.kind])  # one of each kind first


def param(case: Hostile) -> Any:
    return pytest.param(case, id=case.id)


@pytest.mark.parametrize("case", sweep(map(param, [*KINDS, *HELD_OUT]), quick=len(FIRST)))
def test_maps_are_true_by_place_or_refused(case: Hostile) -> None:
    judgements = judge(case)
    assert judgements
    faults = [f"{j.layer} {j.query}: {j.verdict}, not {j.wanted} {j.reason}" for j in judgements if not j.fine]
    assert not faults, "\n".join([case.id, *faults])
