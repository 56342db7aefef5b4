"""What the callback asks of a run's archive: what it holds already, and what a resumed run has not seen."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.record.archive import set_aside, snapshot_path, snapshot_paths, snapshots_between
from tests.support.helpers import tiny_vit


def test_snapshots_between_a_checkpoint_and_now(tmp_path: Path) -> None:
    """Not those of a future that the checkpoint has not seen, nor of other images, nor files of another kind."""
    probe = ProbeBatch(torch.randn(1, 3, 32, 32), names=["a"])
    monitor, model = AttentionMonitor(probe), tiny_vit()
    for step in (0, 2, 4, 6, 8):
        monitor.snapshot({"backbone": model}, step=step).save(snapshot_path(tmp_path, step))
    (tmp_path / "step-copy.npz").touch()
    told: list[str] = []
    assert [s.step for s in snapshots_between(tmp_path, 2, 6, ["a"], told.append)] == [4, 6]
    assert snapshots_between(tmp_path, 2, 6, ["b"], told.append) == []
    assert snapshots_between(tmp_path / "nowhere", 2, 6, ["a"], told.append) == []
    assert told == []
    snapshot_path(tmp_path, 4).write_bytes(b"broken")
    assert [s.step for s in snapshots_between(tmp_path, 2, 6, ["a"], told.append)] == [6]
    assert len(told) == 1
    assert "film strips leave out" in told[0]
    assert "step-000000004.npz" in told[0]


def test_later_steps_are_set_aside_each_time(tmp_path: Path) -> None:
    for step in (0, 2, 4):
        snapshot_path(tmp_path, step).write_text(f"first {step}")
    assert set_aside(tmp_path, 4) == ""
    assert re.search(
        r"resumed from step 1.*reached step 4.*steps 2, 4 were moved to .*superseded-1", set_aside(tmp_path, 1)
    )
    snapshot_path(tmp_path, 2).write_text("second 2")
    assert "The snapshot of step 2 was moved to" in set_aside(tmp_path, 1)
    assert [p.name for p in snapshot_paths(tmp_path)] == ["step-000000000.npz"]
    assert snapshot_path(tmp_path / "superseded-1", 2).read_text() == "first 2"
    assert snapshot_path(tmp_path / "superseded-2", 2).read_text() == "second 2"
