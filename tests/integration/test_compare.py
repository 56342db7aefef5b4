"""What `attn-monitor compare` matches, refuses, computes and draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attn_monitor import ArchiveError, ProbeBatch
from attn_monitor.commands import cli
from attn_monitor.commands.compare import compare, compare_runs, match_steps
from attn_monitor.commands.show import show
from attn_monitor.draw.charts import distinct_labels
from attn_monitor.draw.differences import COLOURS, comparison, difference_level, difference_overlay
from attn_monitor.draw.maps import map_captions, map_statistics
from tests.support.runs import noise_probe, write_run


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 10, 20], [0, 10, 20, 30], [(0, 0), (10, 10), (20, 20)]),
        ([0, 100, 200], [0, 110, 220], [(0, 0), (100, 110), (200, 220)]),
        ([0, 100], [0, 90, 105, 900], [(0, 0), (100, 105)]),
        ([5], [1000, 2000], [(5, 1000)]),
        ([10], [5, 15], [(10, 5)]),
    ],
)
def test_steps_are_matched_with_the_nearest(a: list[int], b: list[int], expected: list[tuple[int, int]]) -> None:
    assert match_steps(a, b) == expected
    if b != [5, 15]:
        assert match_steps(b, a) == [(y, x) for x, y in expected]


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a" / "attn_monitor")
    b = write_run(tmp_path / "b" / "attn_monitor", (0, 11, 21), sharpness=(0, 3, 6))
    cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--steps", "2"])
    said = capsys.readouterr().out
    assert "matched steps (A = B): 0, 10 = 11, 20 = 21" in said
    pictures = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert pictures == [
        "image0-step0.png", "image0-step20-21.png", "image1-step0.png", "image1-step20-21.png", "metrics.png"
    ]  # fmt: skip
    assert all(str(tmp_path / "out" / name) in said for name in pictures)
    rows = compare_runs(tmp_path / "a", tmp_path / "b").table()
    assert {row[:2] for row in rows} == {("student", 1), ("teacher", 1)}
    for role, layer, metric, x, y in rows:
        assert (x, y) == (a[2].metrics[role, layer, metric, None], b[2].metrics[role, layer, metric, None])
        if metric == "entropy":
            assert f"{y - x:+.3g}" in said


def test_two_snapshots(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    found = compare_runs(tmp_path / "a" / "step-000000000.npz", tmp_path / "a" / "step-000000020.npz")
    assert found.steps == ((0, 20),)
    assert next(row for row in found.table() if row[2] == "entropy")[3] > 0.99
    (tmp_path / "a" / "probe.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"probe\.npz: does not exist; it holds the images"):
        compare_runs(tmp_path / "a", tmp_path / "a")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"probe": noise_probe(1)}, "show different images, whose maps cannot be compared: image0, image1 and image0"),
        ({"probe": noise_probe(0, 64)}, "of other sizes, 32 × 32 and 64 × 64 pixels"),
        ({"probe": ProbeBatch(torch.zeros(1, 3, 32, 32))}, r"compared: 2 \(image0, image1\) and 1 \(image0\)"),
        ({"model": {"num_heads": 2}}, "layer 1 of student cannot be compared: its number of heads is 4 in .* and 2 in"),
        ({"model": {"patch_size": 16}}, r"its grid is 4 × 4 in .* and 2 × 2 in"),
        ({"query": (1, 1)}, "its query is cls in .* and "),
        ({"layers": 0}, "no layer is in both: .* holds layer 1 of student, layer 1 of teacher, and .* layer 0 of stud"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, other: dict[str, Any], reason: str) -> None:
    write_run(tmp_path / "a", [0], sharpness=[0])
    write_run(tmp_path / "b", [0], sharpness=[0], **other)
    with pytest.raises(ArchiveError, match=reason):
        compare_runs(tmp_path / "a", tmp_path / "b")


def test_two_results_of_show(tmp_path: Path, capsys: pytest.CaptureFixture[str], photographs: Path) -> None:
    for name, query in {"a": "cls", "b": "mean"}.items():
        folder, image = str(tmp_path / name), str(photographs / "coffee.png")
        show("tests.support.helpers:tiny_vit", image, out=folder, size=32, weights=False, query=query)
    with pytest.raises(ArchiveError, match=r"its query is cls in .* and mean in"):
        compare_runs(tmp_path / "a", tmp_path / "b")
    compare(str(tmp_path / "a"), str(tmp_path / "a" / "attention.npz"), out=str(tmp_path / "out"))
    assert (tmp_path / "out" / "coffee-step0.png").exists()


def test_broken_snapshots_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, broken in {"a": 10, "b": 30}.items():
        write_run(tmp_path / name)
        (tmp_path / name / f"step-0000000{broken}.npz").write_bytes(b"damaged")
    with pytest.raises(ArchiveError, match=r"comparison is without .*a/step-000000010\.npz: .*b/step-000000030\.npz: "):
        compare(str(tmp_path / "a"), str(tmp_path / "b"), out=str(tmp_path / "out"))
    assert "matched steps (A = B): 0, 20\n" in capsys.readouterr().out


def test_layers_of_one_alone_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", [0], sharpness=[0], layers="all")
    write_run(tmp_path / "b", [0], sharpness=[0], roles=["teacher"])
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert found.layers == (("teacher", 1),)
    compare(str(tmp_path / "a"), str(tmp_path / "b"), out=str(tmp_path / "out"))
    assert "left out: layer 0 of student, layer 1 of student, layer 0 of teacher" in capsys.readouterr().err


def test_differences_are_in_units_of_uniform_attention() -> None:
    change = torch.tensor([[1.0, -1.0], [15.0, -40.0]]) / 4
    assert torch.equal(difference_level(change), torch.tensor([[0.25, -0.25], [1.0, -1.0]]))
    grey = np.full((16, 16), 100.0, np.float32)
    picture = difference_overlay(torch.stack([change, torch.zeros(2, 2), torch.full((2, 2), math.nan)]), grey)
    assert (picture[1] == 62).all(), "no difference shows the photograph"
    assert len(np.unique(picture[2].reshape(-1, 3), axis=0)) == 1
    for (y, x), colour in {(8, 0): COLOURS[1], (8, 8): COLOURS[0]}.items():
        near = picture[0][y : y + 8, x : x + 8].reshape(-1, 3)
        assert (np.abs(near.astype(int) - colour) < 20).all(), "the ends have the colour of the run that has more"


def test_captions_are_those_of_panels() -> None:
    maps = torch.stack([torch.full((4, 4), 1 / 16), torch.eye(4) / 4, torch.full((4, 4), math.nan)])
    said = map_captions(["mean", "head 0", "head 1"], maps, map_statistics(maps, 0.6))
    assert said == ["mean · H 1.00 · uniform", "head 0 · H 0.50 · 19%", "head 1 · missing"]
    assert map_captions([""] * 3, maps, map_statistics(maps, 0.6)) == ["H 1.00 · uniform", "H 0.50 · 19%", "missing"]


def test_the_ends_of_axes_are_told_apart() -> None:
    assert distinct_labels(0.25, 0.5) == ("0.25", "0.5")
    assert distinct_labels(0.99981, 0.99998) == ("0.9998", "1")
    assert distinct_labels(0.5, 0.5) == ("0.5", "0.5")


def test_many_heads_fit(tmp_path: Path) -> None:
    (snapshot,) = write_run(tmp_path, [0], sharpness=[0], model={"embed_dim": 64, "num_heads": 16})
    picture = comparison((snapshot, snapshot), ("x" * 300, "b"), 0, noise_probe().pixels[0], [("student", 1)])
    assert picture.shape[1] <= 2600
    Image.fromarray(picture).verify()
