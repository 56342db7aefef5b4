"""Pictures: the right colours in the right places, for every shape of attention."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attn_monitor.attention import LayerAttention
from attn_monitor.draw import canvas as drawing
from attn_monitor.draw import panels as render
from attn_monitor.draw.canvas import MASK, MISSING, TRUTH, Style
from attn_monitor.record.history import thin
from attn_monitor.record.snapshot import AttentionSnapshot


def snapshot(
    rows: torch.Tensor, grid: tuple[int, int], roles: tuple[str, ...] = ("student", "teacher"), step: int = 0
) -> AttentionSnapshot:
    prefix = rows.shape[-1] - grid[0] * grid[1]
    layers = {(role, 3): LayerAttention(3, "blocks.3.attn", rows, prefix, grid, False, 0.0) for role in roles}
    return AttentionSnapshot(step, 0, tuple(f"image{i}" for i in range(len(rows))), layers)


def photo(height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_uniform_attention_is_flat_whatever_the_grid() -> None:
    """The colour of uniform attention is log2(1) = 0 on a scale from -1 to 5: one sixth of the way."""
    for side in (4, 14, 60):
        level = drawing.intensity(np.full((side, side), 1 / side**2), "uniform")
        assert np.allclose(level, 1 / 6)
    assert drawing.intensity(np.array([[16, 0.25]]), "uniform").tolist() == [[1.0, 0.0]]


def test_minmax_stretches_each_map() -> None:
    level = drawing.intensity(np.array([[[0.1, 0.2]], [[0.5, 0.9]]]), "minmax")
    assert level.tolist() == [[[0, 1]], [[0, 1]]]


def test_missing_maps_are_marked_and_never_zeros() -> None:
    maps = np.full((2, 2, 2), 0.25)
    maps[1, 0, 0] = np.nan
    shown = drawing.overlay(maps, np.full((8, 8), 128.0))
    assert (shown[1] == MISSING).all()
    assert not (shown[0] == MISSING).all(-1).any()
    rows = torch.full((1, 2, 5), 0.2)
    rows[0, 1, 3] = math.nan
    picture = render.panel(snapshot(rows, (2, 2), ("backbone",)), 0, photo())
    assert (picture == MISSING).all(-1).sum() > 1000


def outlined(rows: torch.Tensor) -> int:
    """Pixels in the colour of the mask's outline on the maps of a panel, below titles and above the legend."""
    picture = render.panel(snapshot(rows, (14, 14), ("backbone",)), 0, photo(112, 112))
    return int((picture[80:-80] == MASK).all(-1).sum())


def test_no_outline_where_attention_is_practically_uniform() -> None:
    """Which patches are the largest is noise there; an outline of them would be a maze."""
    noise = torch.randn(1, 2, 197)
    faint, clear = (noise * 0.1).softmax(-1), noise.softmax(-1)
    assert render.F.entropy(faint[..., 1:]).min() > render.UNIFORM > render.F.entropy(clear[..., 1:]).max()
    assert outlined(faint) == 0
    assert outlined(clear) > 500
    assert not render.shown_masks(faint[..., 1:].unflatten(-1, (14, 14)), 0.6).any()
    one = torch.cat([faint[:, :1], clear[:, 1:]], 1)
    assert render.shown_masks(one[..., 1:].unflatten(-1, (14, 14)), 0.6).flatten(2).any(-1).tolist() == [[False, True]]


def test_the_border_of_two_objects_is_drawn_once() -> None:
    truth = np.zeros((2, 16, 16), bool)
    truth[0, 2:14, 2:8], truth[1, 2:14, 8:14] = True, True
    cells = drawing.Cells(photo(), (2, 2), Style(), 16, truth)
    green = (cells.photo == TRUTH).all(-1)
    assert cells.size == (16, 16)
    assert green[8].nonzero()[0].tolist() == [2, 8, 13]
    large = drawing.Cells(photo(), (2, 2), Style(), 256, truth)
    assert (large.photo[128] == TRUTH).all(-1).sum() == 2 * 3


def test_only_panels_with_an_object_name_ground_truth() -> None:
    rows = torch.full((1, 2, 5), 0.2)
    truth = np.zeros((1, 64, 64), bool)
    without = render.panel(snapshot(rows, (2, 2)), 0, photo())
    assert np.array_equal(render.panel(snapshot(rows, (2, 2)), 0, photo(), truth=truth), without)
    truth[0, 16:32, 16:32] = True
    bottom = slice(-drawing.LEGEND, None)
    named = render.panel(snapshot(rows, (2, 2)), 0, photo(), truth=truth)[bottom]
    assert (named == TRUTH).all(-1).any()
    assert not (without[bottom] == TRUTH).all(-1).any()


def test_outline_is_the_inner_border() -> None:
    mask = np.zeros((6, 6), bool)
    mask[1:5, 1:5] = True
    picture = np.zeros((6, 6, 3), np.uint8)
    drawing.outline(picture, mask, MASK)
    drawn = (picture == MASK).all(-1)
    assert drawn.sum() == 12
    assert not drawn[2:4, 2:4].any()
    assert not (drawn & ~mask).any()


def test_bright_patch_appears_where_attention_is() -> None:
    """All attention on one patch: in the cell of the head mean, that patch is the brightest."""
    rows = torch.zeros(1, 1, 17)
    rows[0, 0, 1 + 4 * 2 + 3] = 1  # row 2, column 3 of a 4 × 4 grid
    cells = drawing.Cells(photo(), (4, 4), Style(), 64)
    drawn = cells.draw(rows[0, :, 1:].unflatten(-1, (4, 4)).numpy())[0].astype(int).sum(-1)
    patches = drawn.reshape(4, 16, 4, 16).mean((1, 3))
    assert np.unravel_index(patches.argmax(), (4, 4)) == (2, 3)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.sampled_from([("student", "teacher"), ("backbone",)])
)
def test_every_grid_and_number_of_heads_can_be_drawn(gh: int, gw: int, heads: int, roles: tuple[str, ...]) -> None:
    rows = torch.rand(1, heads, gh * gw + 1).softmax(-1)
    history = [snapshot(rows, (gh, gw), roles, step) for step in (0, 5)]
    for picture in (render.panel(history[1], 0, photo()), render.filmstrip(history, 0, photo())):
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert picture.shape[1] <= 4000
    height, width = drawing.cell_size((gh, gw), 128)
    assert (height % gh, width % gw) == (0, 0)
    assert height // gh == width // gw


@pytest.mark.parametrize(("heads", "roles"), [(3, 1), (6, 2), (12, 2), (16, 2), (24, 2)])
def test_panels_are_near_square(heads: int, roles: int) -> None:
    rows = torch.rand(1, heads, 197).softmax(-1)
    names = ("student", "teacher")[:roles]
    height, width, _ = render.panel(snapshot(rows, (14, 14), names), 0, photo()).shape
    assert 0.6 < width / height < 1.7


def test_heads_can_be_chosen() -> None:
    rows = torch.rand(1, 12, 17).softmax(-1)
    maps, labels = render._mean_and_heads(snapshot(rows, (4, 4)).maps("student")[0], (2, 7))
    assert labels == ["mean", "head 2", "head 7"]
    torch.testing.assert_close(maps[2], rows[0, 7, 1:].unflatten(-1, (4, 4)))


def test_film_strip_shows_each_step_once() -> None:
    """A different patch is lit at each step: the strip's columns show them in order."""
    history = []
    for step in range(4):
        rows = torch.full((1, 1, 17), 1e-6)
        rows[0, 0, 1 + step] = 1
        history.append(snapshot(rows, (4, 4), ("backbone",), step))
    picture = render.filmstrip(history, 0, np.zeros((64, 64, 3), np.uint8)).astype(int).sum(-1)
    cells = 64 + drawing.GAP
    left, top = 13 * drawing.GAP + cells, render.HEADER + 4 * drawing.GAP
    for step in range(4):
        cell = picture[top : top + 64, left + step * cells : left + step * cells + 64]
        assert cell.reshape(4, 16, 4, 16).mean((1, 3)).argmax() == step


def test_thin_keeps_first_and_last() -> None:
    assert thin([0, 1, 2], 10) == [0, 1, 2]
    chosen = thin([0, 1, 2, 3, 50, 100], 3)
    assert chosen == [0, 4, 5]


def test_steps_stay_short() -> None:
    assert [drawing.short(s) for s in (0, 950, 12_500, 625_000, 1_250_000)] == ["0", "950", "12,500", "625k", "1.25M"]


def test_encodings_are_what_they_say() -> None:
    picture = photo(40, 56)
    decoded = Image.open(io.BytesIO(drawing.jpeg(picture)))
    assert (decoded.format, decoded.size) == ("JPEG", (56, 40))
    animation = Image.open(io.BytesIO(drawing.gif([picture, picture[::-1].copy()])))
    assert (animation.format, animation.n_frames) == ("GIF", 2)


def test_unknown_scale() -> None:
    with pytest.raises(ValueError, match=r"scale='log': expected \"uniform\""):
        Style(scale="log")
