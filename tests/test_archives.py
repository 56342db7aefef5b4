"""Archives of earlier versions open for ever. `archives/first` was written by the first stage, before any change.

Expected values are those that NumPy alone reads from the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attn_monitor import ArchiveError, AttentionSnapshot, ProbeBatch, load_snapshots
from attn_monitor.attention import OPTIONAL_TENSORS
from attn_monitor.commands import cli

FIRST = Path(__file__).parent / "archives" / "first"
ARCHIVES = sorted(path.name for path in FIRST.iterdir())


def stored(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("header"))), arrays


def test_the_kinds_of_archives_are_there() -> None:
    assert ARCHIVES == ["distillation", "mixed", "nan"]


@pytest.mark.parametrize("name", ARCHIVES)
def test_snapshots_hold_what_was_written(name: str) -> None:
    for snapshot in load_snapshots(FIRST / name):
        header, arrays = stored(FIRST / name / f"step-{snapshot.step:09d}.npz")
        assert (snapshot.step, snapshot.epoch, list(snapshot.names)) == (
            header["step"], header["epoch"], header["names"]
        )  # fmt: skip
        metrics = {tag: float("nan") if value is None else value for tag, value in header["metrics"].items()}
        assert snapshot.scalars() == pytest.approx(metrics, nan_ok=True)
        assert [flag.state_dict() for flag in snapshot.flags] == header["flags"]
        assert len(snapshot.layers) == len(header["layers"])
        for entry, (key, attention) in zip(header["layers"], snapshot.layers.items(), strict=True):
            assert key == (entry["role"], entry["layer"])
            assert (attention.name, attention.num_prefix, list(attention.grid), attention.mixed) == (
                entry["name"], entry["num_prefix"], entry["grid"], entry["mixed"]
            )  # fmt: skip
            np.testing.assert_array_equal(attention.rows.numpy(), arrays[f"rows/{key[0]}/{key[1]}"])
            assert (attention.colors, attention.features) == (None, None)
            for optional in OPTIONAL_TENSORS:
                value, expected = getattr(attention, optional), arrays.get(f"{optional}/{key[0]}/{key[1]}")
                assert (value is None) == (expected is None)
                if expected is not None:
                    np.testing.assert_array_equal(value.numpy(), expected)


def test_the_archives_hold_every_kind_of_thing() -> None:
    """So that the tests here see it."""
    (_, last), (talking, convit), (_, spoilt) = (load_snapshots(FIRST / name) for name in ARCHIVES)
    assert last.roles == ("student", "teacher")
    assert last.flags
    assert all(getattr(last.layer("student", 0), name) is not None for name in ("norms", "cosine", "distance"))
    assert [a.mixed for s in (talking, convit) for a in s.layers.values()] == [True, True, False]
    assert spoilt.rows("teacher").isnan().any()
    assert last.names == ("cat", "größe 1")


@pytest.mark.parametrize("name", ARCHIVES)
def test_probes_hold_what_was_written(name: str) -> None:
    probe = ProbeBatch.load(FIRST / name / "probe.npz")
    header, arrays = stored(FIRST / name / "probe.npz")
    assert (list(probe.names), list(probe.mean), list(probe.std)) == (header["names"], header["mean"], header["std"])
    if "pixels" in arrays:
        np.testing.assert_array_equal(probe.pixels, arrays["pixels"].transpose(0, 2, 3, 1))
    else:
        np.testing.assert_array_equal(probe.images.numpy(), arrays["images"])
    if name == "distillation":
        assert probe.masks is not None
        np.testing.assert_array_equal(probe.masks.numpy(), arrays["masks"])


@pytest.mark.parametrize("name", ARCHIVES)
def test_they_are_drawn_and_written_anew(name: str, tmp_path: Path) -> None:
    cli.replay(str(FIRST / name), out=str(tmp_path))
    for image in ProbeBatch.load(FIRST / name / "probe.npz").names:
        assert np.asarray(Image.open(tmp_path / f"{image}-panel.png")).std() > 10
    for snapshot in load_snapshots(FIRST / name):
        snapshot.save(tmp_path / "again.npz")
        again = AttentionSnapshot.load(tmp_path / "again.npz")
        for key in snapshot.layers:
            assert torch.equal(again.rows(*key).nan_to_num(-1), snapshot.rows(*key).nan_to_num(-1))


def test_what_a_newer_version_writes_says_so(tmp_path: Path) -> None:
    header, arrays = stored(FIRST / "mixed" / "step-000000000.npz")
    np.savez(tmp_path / "x.npz", header=np.array(json.dumps({**header, "format": 3})), **arrays)
    with pytest.raises(ArchiveError, match=r"x\.npz: written by a newer version of attn_monitor, in format 3"):
        AttentionSnapshot.load(tmp_path / "x.npz")
