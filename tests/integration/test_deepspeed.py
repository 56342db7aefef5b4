"""DeepSpeed in two processes on the CPU: training as before under ZeRO's stages 1 and 2, stage 3 refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from attn_monitor import load_snapshots
from tests.faults.test_harmless import assert_equal
from tests.integration.test_distributed import assert_same_attention
from tests.support.processes import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)"),
]


def test_stages_1_and_2_are_watched_and_stage_3_is_refused(tmp_path: Path) -> None:
    ranks = launch("tests.support.deepspeed_work:stages", tmp_path, processes=2, seconds=500)
    for stage in ("1", "2"):
        for rank in ranks:
            assert_equal(rank[stage]["alone"], rank[stage]["watched"])
        assert_same_attention([rank[stage] for rank in ranks])
        (archive,) = (tmp_path / stage).rglob("attn_monitor")  # of process 0 alone
        assert [s.step for s in load_snapshots(archive)] == [0, 1, 2, 3]
    for rank in ranks:
        assert "is partitioned by DeepSpeed's ZeRO stage 3" in rank["3"], rank["3"]
