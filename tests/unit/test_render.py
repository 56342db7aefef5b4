"""Pictures: the right colours in the right places, for every shape of attention."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attn_monitor import DrawingOptions
from attn_monitor import functional as F
from attn_monitor.attention import LayerAttention
from attn_monitor.attention_snapshot import AttentionSnapshot
from attn_monitor.draw.animations import gif
from attn_monitor.draw.canvas import GAP, HEADER, MASK, MISSING, TRUTH, blank_picture, draw_outline, draw_text, jpeg
from attn_monitor.draw.cells import CellPainter, overlay
from attn_monitor.draw.colormap import COLORMAPS, colour_table
from attn_monitor.draw.frame import Frame
from attn_monitor.draw.legend import LEGEND
from attn_monitor.draw.maps import PRACTICALLY_UNIFORM, map_statistics, mean_and_heads
from attn_monitor.draw.panels import panel
from attn_monitor.draw.scales import SCALES
from attn_monitor.draw.strips import filmstrip, short_step
from attn_monitor.measure.metrics import measure
from attn_monitor.record.thinning import thin


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
        level = SCALES["uniform"].position(np.full((side, side), 1 / side**2))
        assert np.allclose(level, 1 / 6)
    assert SCALES["uniform"].position(np.array([[16, 0.25]])).tolist() == [[1.0, 0.0]]


def test_minmax_stretches_each_map() -> None:
    level = SCALES["minmax"].position(np.array([[[0.1, 0.2]], [[0.5, 0.9]]]))
    assert level.tolist() == [[[0, 1]], [[0, 1]]]


def test_missing_maps_are_marked_and_never_zeros() -> None:
    maps = np.full((2, 2, 2), 0.25)
    maps[1, 0, 0] = np.nan
    shown = overlay(maps, np.full((8, 8), 128.0))
    assert (shown[1] == MISSING).all()
    assert not (shown[0] == MISSING).all(-1).any()
    rows = torch.full((1, 2, 5), 0.2)
    rows[0, 1, 3] = math.nan
    picture = panel(snapshot(rows, (2, 2), ("backbone",)), 0, photo())
    assert (picture == MISSING).all(-1).sum() > 1000


def outlined(rows: torch.Tensor) -> int:
    """Pixels in the colour of the mask's outline on the maps of a panel, below titles and above the legend."""
    picture = panel(snapshot(rows, (14, 14), ("backbone",)), 0, photo(112, 112))
    return int((picture[80:-80] == MASK).all(-1).sum())


def test_no_outline_where_attention_is_practically_uniform() -> None:
    """Which patches are the largest is noise there; an outline of them would be a maze."""
    noise = torch.randn(1, 2, 197)
    faint, clear = (noise * 0.1).softmax(-1), noise.softmax(-1)
    assert F.entropy(faint[..., 1:]).min() > PRACTICALLY_UNIFORM > F.entropy(clear[..., 1:]).max()
    assert outlined(faint) == 0
    assert outlined(clear) > 500
    assert not map_statistics(faint[..., 1:].unflatten(-1, (14, 14)), 0.6).mask.any()
    one = torch.cat([faint[:, :1], clear[:, 1:]], 1)
    assert map_statistics(one[..., 1:].unflatten(-1, (14, 14)), 0.6).mask.flatten(2).any(-1).tolist() == [[False, True]]


def test_the_border_of_two_objects_is_drawn_once() -> None:
    truth = np.zeros((2, 16, 16), bool)
    truth[0, 2:14, 2:8], truth[1, 2:14, 8:14] = True, True
    cells = CellPainter(photo(), (2, 2), DrawingOptions(), 16, truth)
    green = (cells.photo == TRUTH).all(-1)
    assert cells.size == (16, 16)
    assert green[8].nonzero()[0].tolist() == [2, 8, 13]
    large = CellPainter(photo(), (2, 2), DrawingOptions(), 256, truth)
    assert (large.photo[128] == TRUTH).all(-1).sum() == 2 * 3


def test_only_panels_with_an_object_name_ground_truth() -> None:
    rows = torch.full((1, 2, 5), 0.2)
    truth = np.zeros((1, 64, 64), bool)
    without = panel(snapshot(rows, (2, 2)), 0, photo())
    assert np.array_equal(panel(snapshot(rows, (2, 2)), 0, photo(), truth=truth), without)
    truth[0, 16:32, 16:32] = True
    bottom = slice(-LEGEND, None)
    named = panel(snapshot(rows, (2, 2)), 0, photo(), truth=truth)[bottom]
    assert (named == TRUTH).all(-1).any()
    assert not (without[bottom] == TRUTH).all(-1).any()


def test_outline_is_the_inner_border() -> None:
    mask = np.zeros((6, 6), bool)
    mask[1:5, 1:5] = True
    picture = np.zeros((6, 6, 3), np.uint8)
    draw_outline(picture, mask, MASK)
    drawn = (picture == MASK).all(-1)
    assert drawn.sum() == 12
    assert not drawn[2:4, 2:4].any()
    assert not (drawn & ~mask).any()


def test_bright_patch_appears_where_attention_is() -> None:
    """All attention on one patch: in the cell of the head mean, that patch is the brightest."""
    rows = torch.zeros(1, 1, 17)
    rows[0, 0, 1 + 4 * 2 + 3] = 1  # row 2, column 3 of a 4 × 4 grid
    cells = CellPainter(photo(), (4, 4), DrawingOptions(), 64)
    drawn = cells.paint(rows[0, :, 1:].unflatten(-1, (4, 4)).numpy())[0].astype(int).sum(-1)
    patches = drawn.reshape(4, 16, 4, 16).mean((1, 3))
    assert np.unravel_index(patches.argmax(), (4, 4)) == (2, 3)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.sampled_from([("student", "teacher"), ("backbone",)])
)
def test_every_grid_and_number_of_heads_can_be_drawn(gh: int, gw: int, heads: int, roles: tuple[str, ...]) -> None:
    rows = torch.rand(1, heads, gh * gw + 1).softmax(-1)
    history = [snapshot(rows, (gh, gw), roles, step) for step in (0, 5)]
    for picture in (panel(history[1], 0, photo()), filmstrip(history, 0, photo())):
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert picture.shape[1] <= 4000
    height, width = Frame.of((gh, gw), 128).size
    assert (height % gh, width % gw) == (0, 0)
    assert height // gh == width // gw


@pytest.mark.parametrize(("heads", "roles"), [(3, 1), (6, 2), (12, 2), (16, 2), (24, 2)])
def test_panels_are_near_square(heads: int, roles: int) -> None:
    rows = torch.rand(1, heads, 197).softmax(-1)
    names = ("student", "teacher")[:roles]
    height, width, _ = panel(snapshot(rows, (14, 14), names), 0, photo()).shape
    assert 0.6 < width / height < 1.7


def test_heads_can_be_chosen() -> None:
    rows = torch.rand(1, 12, 17).softmax(-1)
    maps, labels = mean_and_heads(snapshot(rows, (4, 4)).maps("student")[0], (2, 7))
    assert labels == ["mean", "head 2", "head 7"]
    torch.testing.assert_close(maps[2], rows[0, 7, 1:].unflatten(-1, (4, 4)))


def test_film_strip_shows_each_step_once() -> None:
    """A different patch is lit at each step: the strip's columns show them in order."""
    history = []
    for step in range(4):
        rows = torch.full((1, 1, 17), 1e-6)
        rows[0, 0, 1 + step] = 1
        history.append(snapshot(rows, (4, 4), ("backbone",), step))
    picture = filmstrip(history, 0, np.zeros((64, 64, 3), np.uint8)).astype(int).sum(-1)
    cells = 64 + GAP
    left, top = 13 * GAP + cells, HEADER + 4 * GAP
    for step in range(4):
        cell = picture[top : top + 64, left + step * cells : left + step * cells + 64]
        assert cell.reshape(4, 16, 4, 16).mean((1, 3)).argmax() == step


def test_thin_keeps_first_and_last() -> None:
    assert thin([0, 1, 2], 10) == [0, 1, 2]
    chosen = thin([0, 1, 2, 3, 50, 100], 3)
    assert chosen == [0, 4, 5]


def test_steps_stay_short() -> None:
    assert [short_step(s) for s in (0, 950, 12_500, 625_000, 1_250_000)] == ["0", "950", "12,500", "625k", "1.25M"]


def test_encodings_are_what_they_say() -> None:
    picture = photo(40, 56)
    decoded = Image.open(io.BytesIO(jpeg(picture)))
    assert (decoded.format, decoded.size) == ("JPEG", (56, 40))
    animation = Image.open(io.BytesIO(gif([picture, picture[::-1].copy()])))
    assert (animation.format, animation.n_frames) == ("GIF", 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scale": "log"}, r"scale='log': expected \"uniform\" \(fixed, comparable\) or \"minmax\" \(DINO's look\)"),
        ({"colormap": "jet"}, "colormap='jet': expected one of inferno, viridis"),
        ({"heads": [-1]}, r"heads=\[-1\]: expected "),
        ({"heads": []}, r"heads=\[\]: "),
        ({"heads": [0, 0]}, r"heads=\[0, 0\]: "),
        ({"heads": -3}, "heads=-3: "),
        ({"heads": [True]}, r"heads=\[True\]: "),
        ({"heads": "some"}, "heads='some': "),
        ({"heads": None}, "heads=None: "),
        ({"cell": 0}, "cell=0: expected "),
        ({"cell": True}, "cell=True: expected "),
    ],
)
def test_unknown_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DrawingOptions(**options)


def test_maps_and_legend_have_the_colours_of_the_chosen_table() -> None:
    rows = torch.tensor([[[0.1, 0.5, 0.1, 0.2, 0.1]]])
    pictures = {n: panel(snapshot(rows, (2, 2)), 0, photo(), options=DrawingOptions(colormap=n)) for n in COLORMAPS}
    for name, picture in pictures.items():
        other = next(n for n in COLORMAPS if n != name)
        bar = picture[-LEGEND:].reshape(-1, 3)
        assert (bar == colour_table(name)[128]).all(-1).any()
        assert not (bar == colour_table(other)[128]).all(-1).any()
    assert (pictures["inferno"] != pictures["viridis"])[:-LEGEND].any()


def test_pictures_say_the_numbers_of_the_metrics() -> None:
    taken = snapshot(torch.randn(2, 3, 17).mul(2).softmax(-1), (4, 4), ("backbone",))
    measured = measure(taken.layers, {}, metrics=("entropy", "mask_area"), threshold=0.4)["backbone", 3]
    said = map_statistics(taken.maps("backbone"), 0.4)
    torch.testing.assert_close(said.entropy, measured["entropy"], rtol=0, atol=0)
    torch.testing.assert_close(said.mask_area, measured["mask_area"], rtol=0, atol=0)
    torch.testing.assert_close(said.mask.float().mean((-2, -1)), said.mask_area)


def test_characters_that_the_font_lacks_are_drawn_plainer() -> None:
    """A box in place of × stands for nothing."""

    def drawn(text: str) -> np.ndarray:
        canvas = Image.fromarray(blank_picture(40, 400))
        draw_text(canvas, (4, 4), text, 15)
        return np.asarray(canvas)

    np.testing.assert_array_equal(drawn("× uniform · für – 1 − é"), drawn("x uniform · fur - 1 - e"))
