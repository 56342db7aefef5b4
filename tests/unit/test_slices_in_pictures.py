"""Panels and film strips of clips and volumes: what is painted for each frame or slice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attn_monitor import DrawingOptions, LayerAttention
from attn_monitor.draw.canvas import in_lines, text_width
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.frame import Frame
from attn_monitor.draw.notebook import snapshot_figure, snapshot_sheet
from attn_monitor.draw.panels import CAPTION, layer_title, panel
from attn_monitor.draw.slices import (
    MOST,
    frames_of,
    middle_frame,
    shown_slices,
    slice_cells,
    slice_name,
    slice_photo,
)
from attn_monitor.draw.strips import filmstrip
from attn_monitor.errors import ArgumentError
from attn_monitor.grid import Grid, GridGeometry
from attn_monitor.snapshot import Snapshot


def snapshot(grid: Grid, step: int = 0) -> Snapshot:
    rows = torch.rand(1, 2, 1 + grid.cells, generator=torch.Generator().manual_seed(step)).pow(4)
    layer = LayerAttention(0, "attn", rows / rows.sum(-1, keepdim=True), 1, grid, mixed=False, verified_error=0.0)
    return Snapshot(step, 0, ("a",), {("backbone", 0): layer})


FRAMES = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), dtype=np.uint8)
PHOTO = FRAMES.mean(0).astype(np.uint8)


def test_each_frame_is_painted_over_its_own_photograph() -> None:
    taken, options = snapshot(Grid((3, 4, 6))), DrawingOptions()
    attention = taken.layer("backbone")
    cells = slice_cells(attention, 0, PHOTO, FRAMES, options, 96)
    mean = attention.maps[0].mean(0)
    shares = (mean.flatten(1).sum(1) / mean.sum()).tolist()
    assert [caption for caption, _ in cells] == [
        "maximum of 6 frames",
        *(f"frames {2 * n}-{2 * n + 1} · {share:.0%}" for n, share in enumerate(shares)),
    ]
    ranked = mean.flatten().sort(descending=True)
    count = int((ranked.values.cumsum(0) / mean.sum() < 0.6).sum()) + 1
    mask = torch.zeros(mean.numel(), dtype=torch.bool)
    mask[ranked.indices[:count]] = True  # over all frames together
    for number in range(3):
        painter = CellPainter(FRAMES[2 * number + 1], (4, 6), options, 96)
        wanted = painter.paint((mean[number] * 3).numpy(), mask.view(3, 4, 6)[number].numpy())
        assert np.array_equal(cells[1 + number][1], wanted)
    assert np.array_equal(cells[0][1], CellPainter(PHOTO, (4, 6), options, 96).paint((mean.amax(0) * 3).numpy()))


def test_panels_show_the_mean_first_and_at_most_fourteen_frames() -> None:
    few, many = snapshot(Grid((3, 4, 6))), snapshot(Grid((40, 4, 6), axes=("d", "h", "w")))
    flat = panel(few.in_plane(), 0, PHOTO)
    sheet = panel(few, 0, PHOTO, frames=FRAMES)
    assert sheet.shape != flat.shape
    assert np.array_equal(panel(few.in_plane(), 0, PHOTO, frames=FRAMES), flat)  # it has no frames to show
    chosen = shown_slices(many.layer("backbone"))
    assert len(chosen) == MOST
    assert (chosen[0], chosen[-1]) == (0, 39)
    assert "slice 39" in slice_cells(many.layer("backbone"), 0, PHOTO, None, DrawingOptions(), 64)[-1][0]
    assert shown_slices(few.in_plane().layer("backbone")) == []


def test_a_film_strip_of_a_chosen_slice() -> None:
    history = [snapshot(Grid((3, 4, 6)), step) for step in (0, 10)]
    options = DrawingOptions(slice=2)
    attention = history[0].layer("backbone")
    alone = attention.in_plane(2)
    assert torch.equal(alone.maps, attention.maps[:, :, 2] * 3)
    assert torch.equal(attention.in_plane(99).maps, alone.maps)
    assert np.array_equal(slice_photo(FRAMES, PHOTO, attention, options), FRAMES[5])
    assert np.array_equal(slice_photo(FRAMES, PHOTO, attention, DrawingOptions()), PHOTO)
    assert not np.array_equal(filmstrip(history, 0, PHOTO, options=options), filmstrip(history, 0, PHOTO))
    for wrong in (-1, 0.5, True):
        with pytest.raises(ArgumentError, match="number of a frame or slice"):
            DrawingOptions(slice=wrong)


def test_the_axes_of_spectrograms_are_in_the_title() -> None:
    for axes, title in ((("f", "t"), "frequency downwards, time to the right"), (("h", "w"), "layer 0 (attn)")):
        assert layer_title(snapshot(Grid((4, 6), axes=axes)).layer("backbone")).endswith(title)


def test_uniform_attention_has_no_outline_in_slices_either() -> None:
    flat = snapshot(Grid((3, 4, 6))).layer("backbone")
    flat = replace(flat, rows=torch.full_like(flat.rows, 1 / flat.rows.shape[-1]))
    cells = slice_cells(flat, 0, PHOTO, None, DrawingOptions(), 96)
    unlined = CellPainter(PHOTO, (4, 6), DrawingOptions(), 96).paint((flat.maps[0].mean(0)[0] * 3).numpy())
    assert np.array_equal(cells[1][1], unlined)


def test_what_overlapping_patches_see_beyond_their_cells_is_dark_and_not_hatched() -> None:
    grid = Grid((3, 4), GridGeometry((3.0, 3.0), (10.0, 10.0), (3.0, 3.0)))  # patches of 16, stride 10, in 40 × 48
    photo = np.full((40, 48, 3), 200, np.uint8)
    below = CellPainter(photo, grid, DrawingOptions(), 480).unseen
    rows, columns = round(36 / 40 * below.shape[0]), round(46 / 48 * below.shape[1])
    assert (below[:rows, :columns] == below[0, 0]).all()
    assert (below[rows:] != below[0, 0]).any()
    assert (below[:, columns:] != below[0, 0]).any()
    assert grid.seen_share((40, 48)) == pytest.approx(36 * 46 / (40 * 48))


def test_notebooks_show_frames_too() -> None:
    taken = snapshot(Grid((3, 4, 6)))
    flat, sheet = snapshot_sheet(taken.in_plane()), snapshot_sheet(taken)
    assert sheet.shape[0] > flat.shape[0]
    assert np.array_equal(sheet[20:90, :400], flat[20:90, :400])  # the mean and heads, then frames
    attention = taken.layer("backbone")
    for number in (None, 1, 9):
        figure = snapshot_figure(taken, only=number)
        values = np.asarray(figure.axes[0].images[0].get_array())
        maps = attention.maps[0].mean(0)
        expected = maps.sum(0) if number is None else maps[min(number, 2)] * 3
        assert np.allclose(values, (expected * 24).clamp_min(1e-6).numpy(), rtol=1e-5)
        assert any("frame" in text.get_text() for text in figure.texts) == (number is not None)


def test_frames_of_a_slice() -> None:
    plain, one = Grid((3, 4, 6)), Grid((6, 4, 6))
    assert [middle_frame(plain, n, 6) for n in range(3)] == [1, 3, 5]
    assert [middle_frame(one, n, 6) for n in range(6)] == [0, 1, 2, 3, 4, 5]
    cut = Grid((2, 4, 6), GridGeometry((0.0,) * 3, (16.0, 8.0, 8.0)))  # of 47 frames the last 15 are in no patch
    assert [list(frames_of(cut, n, 47))[::15] for n in range(2)] == [[0, 15], [16, 31]]
    assert [middle_frame(cut, n, 47) for n in range(2)] == [8, 24]
    padded = Grid((2, 4, 6), GridGeometry((-2.0, 0.0, 0.0), (4.0, 8.0, 8.0)))
    assert [list(frames_of(padded, n, 5)) for n in range(2)] == [[0, 1], [2, 3, 4]]
    whole = snapshot(plain).layer("backbone")
    assert [slice_name(whole, 2, frames) for frames in (6, 3, None)] == ["frames 4-5", "frame 2", "frame 2"]


@pytest.mark.parametrize(
    ("grid", "image", "axes"),
    [((4, 16), (32, 32), "hw"), ((2, 32), (32, 32), "hw"), ((512, 1), (1024, 128), "tf"), ((3, 8), (30, 40), "hw")],
)
def test_oblong_patches_do_not_distort_the_image(grid: tuple[int, int], image: tuple[int, int], axes: str) -> None:
    frame = Frame.of(Grid(grid, axes=tuple(axes)), 320, image)
    assert frame.size[0] / frame.size[1] == pytest.approx(image[0] / image[1], rel=0.5)
    assert frame.patch[0] / frame.patch[1] == pytest.approx(image[0] / grid[0] * grid[1] / image[1], rel=0.5)
    mark = np.zeros((*grid, 1), np.uint8)
    mark[-1, -1] = 1
    assert frame.enlarge(mark)[-frame.patch[0] :, -frame.patch[1] :].all()
    assert frame.enlarge(mark).sum() == frame.patch[0] * frame.patch[1]
    signal = Frame.of(Grid((1, 16), axes=("", "t")), 320, (1, 64))
    assert signal.patch[0] == signal.patch[1]


def test_long_images_have_readable_panels() -> None:
    """Spectrograms as published, 1,024 frames of 128 bins: captions lie side by side, the title is whole."""
    taken = snapshot(Grid((101, 12), axes=("t", "f")))
    picture = panel(taken, 0, np.zeros((1024, 128, 3), np.uint8))
    assert picture.shape[0] > 600
    assert picture.shape[1] >= 4 * CAPTION
    title = layer_title(taken.layer("backbone"), "backbone", unseen=0.02) + " · what patches receive"
    lines = in_lines(title, 300, 15)
    assert " · ".join(lines) == title
    assert len(lines) > 1
    assert all(text_width(line, 15) <= 300 for line in lines)
    assert in_lines("short", 300, 15) == ["short"]
