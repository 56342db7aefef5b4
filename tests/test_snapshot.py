"""The archive's files: complete or not there, readable by NumPy alone, and clear about what they are not."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_monitor import ArchiveError, AttentionMonitor, AttentionSnapshot, ProbeBatch, load_snapshots
from attn_monitor.snapshot import snapshot_path
from tests.helpers import tiny_vit


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
    AttentionSnapshot(1, 0, snapshot.names, snapshot.layers, {"x": float("nan")}).save(tmp_path / "x.npz")
    loaded = AttentionSnapshot.load(tmp_path / "x.npz")
    assert np.isnan(loaded.metrics["x"])
    assert loaded.rows("student", 0)[0, 0].isnan().all()


def test_names_what_it_holds(snapshot: AttentionSnapshot) -> None:
    with pytest.raises(KeyError, match=r"'gram'.*student, teacher"):
        snapshot.rows("gram")
    with pytest.raises(KeyError, match=r"layer 5.*\[0, 1\]"):
        snapshot.rows("student", 5)


def test_state_dict_round_trip(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    torch.save(snapshot.state_dict(), tmp_path / "x.pt")
    loaded = AttentionSnapshot.from_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    torch.testing.assert_close(loaded.rows("teacher"), snapshot.rows("teacher"), atol=1e-4, rtol=1e-3)


def test_other_files_are_refused(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, header=np.array(json.dumps({"format": 99})))
    with pytest.raises(ArchiveError, match="format 99, expected 1"):
        AttentionSnapshot.load(path)
    np.savez(path, header=np.array({"format": 1}, dtype=object))
    with pytest.raises(ArchiveError, match="not a readable"):
        AttentionSnapshot.load(path)
    np.savez(path, header=np.array(json.dumps({"format": 1, "step": 1})))
    with pytest.raises(ArchiveError, match="do not fit together"):
        AttentionSnapshot.load(path)
    with pytest.raises(FileNotFoundError, match="no snapshots"):
        load_snapshots(tmp_path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_files_never_raise_anything_else(
    tmp_path: Path, snapshot: AttentionSnapshot, data: st.DataObject
) -> None:
    path = snapshot_path(tmp_path, 7)
    snapshot.save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    with contextlib.suppress(ArchiveError):
        AttentionSnapshot.load(path)
