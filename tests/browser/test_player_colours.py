"""The player colours a map as panels do: pixels in the browser next to those that Python paints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_monitor import AttentionSnapshot, LayerAttention, ProbeBatch
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.differences import difference_overlay
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.grid import Grid, GridGeometry
from attn_monitor.player.report import report_page
from attn_monitor.record.archive import snapshot_path
from tests.support.browser import CHROMIUM, Watched, browsing, pixels_of

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

SIZE, GRID = 64, (8, 8)
ROUNDING = 2  # of 255: a canvas rounds alpha and premultiplied colours to 8 bits, and photographs are JPEG
COLOURS = [(255, 255, 255), (200, 120, 40), (30, 90, 220)]  # of the photographs


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with browsing() as browser:
        yield browser


def run_at(folder: Path, seed: int, geometry: GridGeometry | None = None) -> AttentionSnapshot:
    """An archive of one snapshot: photographs of one colour each, and weights from 1/100 to 60 times uniform."""
    photos = torch.tensor(COLOURS).view(3, 3, 1, 1).expand(3, 3, SIZE, SIZE) / 255
    ProbeBatch(photos, mean=(0, 0, 0), std=(1, 1, 1)).save(folder / "probe.npz")
    scores = torch.randn(3, 1, GRID[0] * GRID[1], generator=torch.Generator().manual_seed(seed)) * 2
    rows = torch.cat([torch.zeros(3, 1, 1), scores.softmax(-1)], -1)
    layer = LayerAttention(0, "blocks.0", rows.half().float(), 1, Grid(GRID, geometry), False, 0.0)
    snapshot = AttentionSnapshot(0, 0, ("image0", "image1", "image2"), {("model", 0): layer})
    snapshot.save(snapshot_path(folder, 0))
    return snapshot


def painter_of(image: int, options: DrawingOptions) -> CellPainter:
    return CellPainter(np.full((SIZE, SIZE, 3), COLOURS[image], np.uint8), GRID, options, SIZE)


def centres(picture: np.ndarray) -> np.ndarray:
    """The pixel in the middle of each patch, (8, 8, 3)."""
    patch = picture.shape[0] // GRID[0]
    return picture[patch // 2 :: patch, patch // 2 :: patch].astype(np.int64)


@pytest.mark.parametrize("scale", ["uniform", "minmax"])
@pytest.mark.parametrize("colormap", ["inferno", "viridis"])
def test_a_map_has_the_colours_of_a_panel(tmp_path: Path, watched: Watched, scale: str, colormap: str) -> None:
    snapshot = run_at(tmp_path, 0)
    (tmp_path / "x.html").write_text(report_page([("run", tmp_path)]))
    options = DrawingOptions(scale=scale, colormap=colormap)
    for image in range(len(COLOURS)):
        page = watched.open(tmp_path / "x.html", f"image={image}&mask=false&scale={scale}&table={colormap}")
        expected = painter_of(image, options).paint(snapshot.maps("model", 0)[image, 0].numpy())
        shown = pixels_of(page.locator("figure canvas").first)
        np.testing.assert_allclose(centres(shown), centres(expected), atol=ROUNDING)
    watched.check()


def test_a_difference_has_the_colours_of_a_comparison(tmp_path: Path, watched: Watched) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    maps = [run_at(folder, seed).maps("model", 0)[:, 0] for seed, folder in enumerate(folders)]
    (tmp_path / "x.html").write_text(report_page([("a", folders[0]), ("b", folders[1])]))
    for image in range(len(COLOURS)):
        page = watched.open(tmp_path / "x.html", f"image={image}&compare=difference")
        painter = painter_of(image, DrawingOptions())
        expected = difference_overlay((maps[1] - maps[0])[image], painter.grey)
        shown = pixels_of(page.locator("figure canvas").first)
        np.testing.assert_allclose(centres(shown), centres(expected), atol=ROUNDING)
    watched.check()


def test_what_no_patch_sees_is_as_dark_as_in_a_panel(tmp_path: Path, watched: Watched) -> None:
    """In the space between hatching lines, right of patches that end in the middle of the image."""
    grid = Grid(GRID, GridGeometry((0.0, 0.0), (4.0, 4.0)))
    run_at(tmp_path, 0, grid.geometry)
    (tmp_path / "x.html").write_text(report_page([("run", tmp_path)]))
    page = watched.open(tmp_path / "x.html", "image=1&mask=false")
    shown = pixels_of(page.locator("figure canvas").first)
    photo = np.full((SIZE, SIZE, 3), COLOURS[1], np.uint8)
    panel = CellPainter(photo, grid, DrawingOptions(), 4 * SIZE).unseen
    for picture in (shown, panel.astype(np.int64)):
        unseen = picture[: picture.shape[0] // 2, 3 * picture.shape[1] // 4 :].reshape(-1, 3)
        assert abs(unseen.min() - 0.25 * np.dot(COLOURS[1], [0.299, 0.587, 0.114])) <= ROUNDING
        assert abs(unseen.max() - 78) <= ROUNDING
    watched.check()
