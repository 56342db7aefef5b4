"""What the callback asks of a run: a free archive, and what an archive holds already."""

from __future__ import annotations

from pathlib import Path

import torch

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.run import free_archive, written_between
from attn_monitor.snapshot import snapshot_path
from tests.helpers import tiny_vit


def test_an_archive_is_free_when_it_is_empty_and_promised_to_nobody(tmp_path: Path) -> None:
    """The first callback of a new run may have been given the number that the second would start with."""
    assert free_archive(tmp_path, "attn_monitor", 1, {None}) == "attn_monitor"
    (tmp_path / "attn_monitor").mkdir()
    (tmp_path / "attn_monitor" / "step-000000000.npz").touch()
    assert free_archive(tmp_path, "attn_monitor", 1, {None}) == "attn_monitor-2"
    assert free_archive(tmp_path, "attn_monitor", 2, {None, "attn_monitor-2"}) == "attn_monitor-3"


def test_snapshots_between_a_checkpoint_and_now(tmp_path: Path) -> None:
    """Not those of a future that the checkpoint has not seen, nor of other images, nor files of another kind."""
    probe = ProbeBatch(torch.randn(1, 3, 32, 32), names=["a"])
    monitor, model = AttentionMonitor(probe), tiny_vit()
    for step in (0, 2, 4, 6, 8):
        monitor.snapshot({"backbone": model}, step=step).save(snapshot_path(tmp_path, step))
    (tmp_path / "step-copy.npz").touch()
    assert [s.step for s in written_between(tmp_path, 2, 6, ["a"])] == [4, 6]
    assert written_between(tmp_path, 2, 6, ["b"]) == []
    assert written_between(tmp_path / "nowhere", 2, 6, ["a"]) == []
    snapshot_path(tmp_path, 4).write_bytes(b"broken")
    assert written_between(tmp_path, 2, 6, ["a"]) == []
