"""Frames of clips and slices of volumes in the player: what its second slider shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attn_monitor import AttentionMonitor, AttentionSnapshot, ProbeBatch
from attn_monitor.commands.report import report
from attn_monitor.player.blocks import layout_of
from attn_monitor.player.contents import gather
from attn_monitor.player.server import Library
from attn_monitor.player.slices import in_slices, masks_of, pictures_of, pixels_of
from attn_monitor.record.archive import snapshot_path
from tests.support.browser import CHROMIUM, browsing
from tests.support.browser import pixels_of as drawn_on
from tests.support.more_axes import AnyViT, BandsViT

SIZES = {"t": (4, 32, 32), "d": (6, 32, 48)}


def _archive(folder: Path, axis: str) -> tuple[ProbeBatch, list[AttentionSnapshot]]:
    """Two clips, or two volumes, at two steps, with objects in some frames."""
    torch.manual_seed(1)
    size = SIZES[axis]
    images, masks = torch.rand(2, 3, *size), torch.zeros(2, 1, *size, dtype=torch.bool)
    masks[0, 0, 1, 8:20, 4:16] = True
    plain: dict[str, Any] = {"mean": (0,) * 3, "std": (1,) * 3, "names": ["one", "two"]}
    probe = ProbeBatch(images, masks=masks, axes=f"c{axis}hw", **plain)
    model, monitor = AnyViT(size, (2, 8, 8), channels=3).eval(), AttentionMonitor(probe)
    probe.save(folder / "probe.npz")
    snapshots = []
    for step in (0, 10):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape) * (1 + step / 5) / parameter[0].numel() ** 0.5)
        snapshots.append(monitor.colored(monitor.snapshot({"backbone": model}, step=step)))
        snapshots[-1].save(snapshot_path(folder, step))
    return probe, snapshots


@pytest.mark.parametrize("axis", SIZES)
def test_pictures_are_the_mean_the_maximum_and_every_slice(tmp_path: Path, axis: str) -> None:
    probe, snapshots = _archive(tmp_path, axis)
    attention = snapshots[-1].layer("backbone")
    depth, rows, cols = attention.grid
    pictures = pictures_of(snapshots[-1], probe)
    names, word = pictures.names, {"t": "frames", "d": "slices"}[axis]
    assert names == [f"mean of {2 * depth}", "maximum", *(f"{word} {2 * n}-{2 * n + 1}" for n in range(depth))]
    flat = in_slices(snapshots[-1], len(names))
    shown = flat.layer("backbone")
    assert shown.grid == (rows, cols)
    maps = shown.maps.reshape(2, len(names), 4, rows, cols)
    uniform = attention.maps * depth * rows * cols  # (B, H, depth, rows, cols) in units of uniform attention
    for image in range(2):
        wanted = [uniform[image].mean(1), uniform[image].amax(1), *uniform[image].unbind(1)]
        torch.testing.assert_close(maps[image] * rows * cols, torch.stack(wanted))
    assert torch.equal(shown.rows[: len(names), :, 0], attention.rows[0, :, 0].expand(len(names), -1))
    assert attention.colors is not None
    assert shown.colors is not None
    colours = attention.colors[1].reshape(depth, rows * cols, 3)
    assert torch.equal(shown.colors[len(names) + 2 :], colours)

    photos = pixels_of(probe, pictures).reshape(2, len(names), *SIZES[axis][1:], 3)
    frames = (probe.images.movedim(1, -1) * 255).round().byte().numpy()
    assert np.array_equal(photos[:, 2:], frames[:, 1::2])  # two frames in a patch, of which one is shown
    assert np.array_equal(photos[:, 1], frames.max(1) if axis == "d" else photos[:, 0])
    truths = masks_of(probe, pictures)
    assert truths is not None
    assert probe.masks is not None
    assert [int(t.sum()) for t in truths[: len(names)]] == [144, 144, 144, *[0] * (depth - 1)]

    found = gather(tmp_path, "run", 4_000_000)
    manifest = found.manifest()
    assert manifest["pictures"] == names
    assert len(manifest["images"]) == 2 * len(names)
    assert manifest["layouts"][0][0]["axes"] == ["h", "w"]
    library = Library(lambda: {"run": tmp_path})
    assert library.run("run", -1, "")["pictures"] == names
    assert library.block("run", 10, attention.layer) == found.steps[-1].blocks[attention.layer]
    assert layout_of(flat)[0]["grid"] == [rows, cols]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_second_slider(tmp_path: Path) -> None:
    _archive(tmp_path / "attn_monitor", "t")
    report(str(tmp_path / "attn_monitor"), out=str(tmp_path / "report.html"))
    with browsing() as watched:
        page = watched.open(tmp_path / "report.html")
        slider, output = page.locator("#picture"), page.locator("output[for=picture]")
        assert page.locator("label[for=picture]").inner_text() == "Frame"
        assert output.inner_text() == "mean of 4"
        assert page.locator(".thumbnail").count() == 3  # all, and two clips
        seen = []
        for number, name in enumerate(("mean of 4", "maximum", "frames 0-1", "frames 2-3")):
            slider.fill(str(number))
            watched.settle()
            assert output.inner_text() == name
            seen.append(drawn_on(page.locator("figure canvas").first))
        assert len({picture.tobytes() for picture in seen}) == 4
        page.locator("#pictures").click(position={"x": 2, "y": 2})
        page.keyboard.press("]")
        page.keyboard.press(",")
        watched.settle()
        assert output.inner_text() == "frames 0-1"
        page.wait_for_timeout(400)  # a link is written a little later
        assert page.url.endswith("image=6")
        page.locator(".thumbnail.every").click()
        watched.settle()
        assert page.locator(".item h2").all_inner_texts() == ["one", "two"]
        watched.check()


def test_groups_of_channels_have_the_photograph_itself(tmp_path: Path) -> None:
    masks = torch.zeros(2, 1, 16, 24, dtype=torch.bool)
    masks[1, 0, 4:8] = True
    probe = ProbeBatch(torch.rand(2, 6, 16, 24), masks=masks, mean=(0,) * 6, std=(1,) * 6)
    snapshot = AttentionMonitor(probe).snapshot({"backbone": BandsViT(None).eval()}, step=0)
    assert snapshot.layer("backbone").grid.axes == ("c", "h", "w")
    probe.save(tmp_path / "probe.npz")
    snapshot.save(snapshot_path(tmp_path, 0))
    pictures = pictures_of(snapshot, probe)
    assert pictures.names[2:] == [f"channel group {n}" for n in range(6)]
    assert np.array_equal(pixels_of(probe, pictures), probe.pixels.repeat(8, axis=0))
    truths = masks_of(probe, pictures)
    assert truths is not None
    assert torch.equal(truths[8:], masks[1:].expand(8, -1, -1, -1))
    assert len(gather(tmp_path, "run", 1e6).images["images"]) == 16
