"""The archive's files: complete or not there, readable by NumPy alone, and clear about what they are not."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_monitor import ArchiveError, AttentionMonitor, AttentionSnapshot, ProbeBatch, load_snapshots
from attn_monitor.attention import LayerAttention, PatchColors
from attn_monitor.grid import Grid
from attn_monitor.measurements import MetricKey, Metrics
from attn_monitor.record import npz
from attn_monitor.record.archive import snapshot_path
from attn_monitor.record.snapshot_file import snapshot_from_state, snapshot_state
from tests.support.helpers import tiny_vit


@pytest.fixture
def snapshot() -> AttentionSnapshot:
    probe = ProbeBatch(torch.randn(2, 3, 32, 32), names=["a", "b"])
    return AttentionMonitor(probe, layers="all").snapshot(
        {"student": tiny_vit(), "teacher": tiny_vit()}, step=7, epoch=1
    )


def test_round_trip(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    snapshot.save(tmp_path / "x.npz")
    loaded = AttentionSnapshot.load(tmp_path / "x.npz")
    assert (loaded.step, loaded.epoch, loaded.names, loaded.roles) == (7, 1, ("a", "b"), ("student", "teacher"))
    assert loaded.metrics == snapshot.metrics
    assert loaded.layers_of("student") == (0, 1)
    for key in snapshot.layers:
        torch.testing.assert_close(loaded.rows(*key), snapshot.rows(*key), atol=1e-4, rtol=1e-3)
        assert loaded.layers[key].name == snapshot.layers[key].name
        assert loaded.maps(*key).shape == (2, 4, 4, 4)


def test_numpy_alone_reads_it(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    snapshot.save(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert file["rows/teacher/1"].shape == (2, 4, 17)
        assert json.loads(str(file["header"]))["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_missing_values_stay_missing(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    snapshot.layers["student", 0].rows[0, 0] = torch.nan
    AttentionSnapshot(1, 0, snapshot.names, snapshot.layers, Metrics({MetricKey("student", 0, "x"): math.nan})).save(
        tmp_path / "x.npz"
    )
    loaded = AttentionSnapshot.load(tmp_path / "x.npz")
    assert np.isnan(loaded.metrics["student", 0, "x", None])
    assert loaded.rows("student", 0)[0, 0].isnan().all()


def test_names_what_it_holds(snapshot: AttentionSnapshot) -> None:
    with pytest.raises(KeyError, match=r"'gram'.*student, teacher"):
        snapshot.rows("gram")
    with pytest.raises(KeyError, match=r"layer 5.*\[0, 1\]"):
        snapshot.rows("student", 5)


def test_state_dict_round_trip(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    torch.save(snapshot_state(snapshot), tmp_path / "x.pt")
    loaded = snapshot_from_state(torch.load(tmp_path / "x.pt", weights_only=True))
    torch.testing.assert_close(loaded.rows("teacher"), snapshot.rows("teacher"), atol=1e-4, rtol=1e-3)


def test_other_files_are_refused(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, header=np.array(json.dumps({"format": 99})))
    with pytest.raises(ArchiveError, match=r"x\.npz: written by a newer version of attn_monitor.*Update attn_monitor"):
        AttentionSnapshot.load(path)
    np.savez(path, header=np.array({"format": 1}, dtype=object))
    with pytest.raises(ArchiveError, match="header is object, expected text"):
        AttentionSnapshot.load(path)
    np.savez(path, header=np.array(json.dumps({"format": 1, "step": 1})))
    with pytest.raises(ArchiveError, match=r"x\.npz: the header has no 'names'"):
        AttentionSnapshot.load(path)
    with pytest.raises(FileNotFoundError, match="no snapshots"):
        load_snapshots(tmp_path)


def test_colleagues_can_read_what_the_umask_lets_them(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    before = os.umask(0o027)
    try:
        snapshot.save(tmp_path / "x.npz")
    finally:
        os.umask(before)
    assert (tmp_path / "x.npz").stat().st_mode & 0o777 == 0o640


def test_large_files_are_stored_as_they_are(
    tmp_path: Path, snapshot: AttentionSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would unpack to more than a reader accepts of a small file: this one would shrink to a thousandth."""
    snapshot.layers["student", 0].rows[:] = torch.nan
    snapshot.save(tmp_path / "small.npz")
    monkeypatch.setattr(npz, "PACKED_BYTES", 1000)
    snapshot.save(tmp_path / "large.npz")
    assert AttentionSnapshot.load(tmp_path / "large.npz").rows("student", 0).isnan().all()
    with pytest.raises(ArchiveError, match="more than a file of this size can hold"):
        AttentionSnapshot.load(tmp_path / "small.npz")


def test_a_file_has_the_step_it_is_named_after(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    snapshot.save(snapshot_path(tmp_path, 8))
    with pytest.raises(ArchiveError, match=r"step-000000008\.npz: holds step 7"):
        load_snapshots(tmp_path)


def test_rows_that_are_no_distributions_are_stored_as_such(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    """Weights of any size, whose sums float16 does not hold to a hundredth."""
    rows = 3000.1 * snapshot.rows("student", 0)
    attention = replace(snapshot.layers["student", 0], rows=rows, kind="weights")
    metrics = Metrics({MetricKey("student", 0, "prefix_mass"): float(rows[..., 0].mean())})
    AttentionSnapshot(7, 1, snapshot.names, {("student", 0): attention}, metrics).save(tmp_path / "x.npz")
    loaded = AttentionSnapshot.load(tmp_path / "x.npz")
    assert loaded.layer("student").kind == "weights"
    torch.testing.assert_close(loaded.rows("student"), rows, atol=1e-3, rtol=1e-3)


def test_metrics_are_found_by_key_and_by_tag() -> None:
    metrics = Metrics({MetricKey("a/b", 3, "peak"): 0.5, MetricKey("a/b", 3, "peak", 2): 0.25})
    for key, value in metrics.items():
        assert metrics[key] == metrics[tuple(key)] == metrics[key.tag] == metrics.get(key.tag) == value
        assert key.tag in metrics
        assert tuple(key) in metrics
        assert MetricKey.from_tag(key.tag) == key
    for missing in ("attn/a/b/layer3/entropy", "attn/health_flags", "attn_heads/a/layer3/peak", "x", ("a", 1)):
        assert missing not in metrics
        assert metrics.get(missing, 7) == 7
        with pytest.raises(KeyError):
            metrics[missing]


@pytest.mark.parametrize("errors", [(math.nan, 0.1, 0.2), (0.1, math.nan, 0.2), (0.2, 0.1, math.nan), (0.1, 0.2, 0.15)])
def test_parts_that_were_not_checked_leave_the_whole_unchecked(errors: tuple[float, ...]) -> None:
    parts = [LayerAttention(0, "x", torch.ones(1, 1, 4), 0, Grid((2, 2)), False, error) for error in errors]
    expected = math.nan if any(map(math.isnan, errors)) else 0.2
    assert LayerAttention.cat(parts).verified_error == pytest.approx(expected, nan_ok=True)


def test_parts_put_together_have_no_colours_of_one_of_them() -> None:
    colors = PatchColors(torch.ones(1, 4, 3), 1.0)
    part = LayerAttention(0, "x", torch.ones(1, 1, 4), 0, Grid((2, 2)), False, 0.0, patch_colors=colors)
    assert LayerAttention.cat([part, part]).colors is None
