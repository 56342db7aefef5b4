"""Patches are measured and drawn where the model sees them in the image's own pixels, whatever it does to the image."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, AttentionSnapshot, ProbeBatch, record_attention
from attn_monitor import functional as AF
from attn_monitor.attention import LayerAttention
from attn_monitor.commands.compare import compare_runs
from attn_monitor.commands.report import report
from attn_monitor.draw.canvas import MASK
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.panels import panel
from attn_monitor.draw.single import PixelPictures
from attn_monitor.draw.video_frames import FrameDrawing
from attn_monitor.errors import ArchiveError
from attn_monitor.grid import Grid, GridGeometry
from attn_monitor.record.snapshot_file import snapshot_from_state, snapshot_state
from tests.support.browser import CHROMIUM, browsing, pixels_of
from tests.support.oracle import attention_matrices
from tests.support.styles import DIM, PATCH, Block, MemEffAttention
from tests.support.zoo import enliven, hugging_face, timm_vit

Borders = tuple[list[float], list[float]]
"""Of rows and of columns, in pixels of the image."""


class CutOut(nn.Linear):
    """A linear layer on patches of the image, as many as are whole."""

    def __init__(self) -> None:
        super().__init__(3 * PATCH**2, DIM)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        return super().forward(patches).transpose(1, 2)[..., None]


class Inside(nn.Module):
    """Does something to its images, then a ViT whose patch embedding drops what is left over.

    It is a convolution, or ``linear`` on patches that are cut out.
    """

    def __init__(self, change: Callable[[Tensor], Tensor], grid: tuple[int, int], linear: bool = False) -> None:
        super().__init__()
        self.change = change
        self.proj = CutOut() if linear else nn.Conv2d(3, DIM, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1], DIM))
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.blocks = nn.ModuleList(Block(MemEffAttention()) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(self.change(images)).flatten(2).transpose(1, 2) + self.pos_embed
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def noise(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def pad_right(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % PATCH, 0, -x.shape[-2] % PATCH))


def pad_both(x: Tensor) -> Tensor:
    down, across = (-n % PATCH for n in x.shape[-2:])
    return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))


def letterbox(x: Tensor) -> Tensor:
    longest = -(-max(x.shape[-2:]) // PATCH) * PATCH
    down, across = (longest - n for n in x.shape[-2:])
    return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))


def crop(x: Tensor) -> Tensor:
    top, left = (x.shape[-2] - 32) // 2, (x.shape[-1] - 32) // 2
    return x[..., top : top + 32, left : left + 32]


def whole(cells: int, pixels: int) -> list[float]:
    return [i * pixels / cells for i in range(cells + 1)]


def steps(first: int, cells: int, pixels: int) -> list[float]:
    """Borders of patches from a pixel on, as far as they are in the image."""
    return [min(max(first + i * PATCH, 0), pixels) for i in range(cells + 1)]


# What a model does, the grid that its position embedding is made for, the image, and where patches lie in it.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int], tuple[int, int], Borders]] = {
    "drops": (lambda x: x, (4, 5), (39, 45), (steps(0, 4, 39), steps(0, 5, 45))),
    "drops one pixel": (lambda x: x, (4, 5), (33, 40), (steps(0, 4, 33), steps(0, 5, 40))),
    "pads right": (pad_right, (5, 5), (33, 37), (steps(0, 5, 33), steps(0, 5, 37))),
    "pads both sides": (pad_both, (5, 6), (36, 43), (steps(-2, 5, 36), steps(-2, 6, 43))),
    "pads left": (lambda x: F.pad(x, (3, 0, 0, 0)), (4, 5), (32, 37), (steps(0, 4, 32), steps(-3, 5, 37))),
    "pads to a square": (letterbox, (6, 6), (26, 48), (steps(-3, 4, 26), steps(0, 6, 48))),
    "pads whole patches": (letterbox, (6, 6), (32, 48), (whole(4, 32), whole(6, 48))),
    "crops": (crop, (4, 4), (40, 57), (steps(4, 4, 40), steps(12, 4, 57))),
}


@pytest.mark.parametrize("linear", [False, True], ids=["convolution", "linear"])
@pytest.mark.parametrize("name", CASES)
def test_borders_and_distance_are_in_the_images_own_pixels(name: str, linear: bool) -> None:
    change, grid, size, borders = CASES[name]
    model, images = enliven(Inside(change, grid, linear)).eval(), noise(*size)
    probe = ProbeBatch(images, mean=(0, 0, 0), std=(1, 1, 1))
    attention = AttentionMonitor(probe, metrics="all").snapshot({"backbone": model}, step=0).layer("backbone")
    assert attention.places == "exact"
    found = borders_of(attention, size)
    assert found == borders
    matrix = attention_matrices(model, images, lambda m, x: m(x))[-1]
    assert attention.distance is not None
    torch.testing.assert_close(attention.distance.double(), distance(matrix, grid, borders), rtol=1e-3, atol=1e-2)


def borders_of(attention: LayerAttention, size: tuple[int, int]) -> Borders:
    rows, cols = attention.grid.borders(size)
    return rows, cols


def distance(matrix: Tensor, grid: tuple[int, int], borders: Borders) -> Tensor:
    """Of the patches that see the image, from a matrix over all of the model's patches."""
    middles = [[(a + b) / 2 for a, b in itertools.pairwise(axis)] for axis in borders]
    top, left = ((cells - len(axis)) // 2 for cells, axis in zip(grid, middles, strict=True))  # rows of padding alone
    tokens = [1 + (top + r) * grid[1] + left + c for r in range(len(middles[0])) for c in range(len(middles[1]))]
    at = torch.tensor([*itertools.product(*middles)], dtype=torch.float64)
    weights = matrix[:, :, tokens][..., tokens]
    return (weights / weights.sum(-1, keepdim=True) * torch.cdist(at, at)).sum(-1).mean(-1)


@pytest.mark.parametrize(
    ("change", "size", "borders"),
    [
        (lambda x: F.interpolate(x, (48, 48), mode="bilinear"), (50, 70), (whole(6, 50), whole(6, 70))),
        (lambda x: F.interpolate(x, (48, 48), mode="bicubic", antialias=True), (96, 75), (whole(6, 96), whole(6, 75))),
        (
            lambda x: letterbox(F.interpolate(x, (30, 48), mode="bilinear")),
            (60, 96),
            ([0, 14, 30, 46, 60], whole(6, 96)),
        ),
        (
            lambda x: F.interpolate(x, (48, 72), mode="bilinear")[..., 12:60],
            (96, 144),
            (whole(6, 96), [24 + 16 * i for i in range(7)]),
        ),
    ],
    ids=["stretched", "stretched, antialiased", "letterboxed", "cropped"],
)
def test_what_is_resized_is_where_it_was_before(
    change: Callable[[Tensor], Tensor], size: tuple[int, int], borders: Borders
) -> None:
    model = enliven(Inside(change, (6, 6))).eval()
    (attention,) = record_attention(model, noise(*size))
    for found, expected in zip(borders_of(attention, size), borders, strict=True):
        np.testing.assert_allclose(found, expected, atol=1.0)


def hf_vit(size: int) -> nn.Module:
    return hugging_face("ViTModel", "ViTConfig", "sdpa", image_size=size)


@pytest.mark.parametrize(
    ("build", "size", "borders"),
    [
        (lambda: hf_vit(32), (39, 39), (steps(0, 4, 39),) * 2),
        (lambda: hugging_face("Dinov2Model", "Dinov2Config", "sdpa"), (38, 47), (steps(0, 4, 38), steps(0, 5, 47))),
        (
            lambda: timm_vit("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True),
            (36, 45),
            (steps(0, 5, 36), steps(0, 6, 45)),
        ),
    ],
    ids=["Hugging Face ViT", "Hugging Face DINOv2", "timm, padding"],
)
def test_library_models_of_sizes_that_are_no_multiple(
    build: Callable[[], nn.Module], size: tuple[int, int], borders: Borders
) -> None:
    model, images = enliven(build()).eval(), noise(*size)
    probe = ProbeBatch(images, mean=(0, 0, 0), std=(1, 1, 1))
    attention = AttentionMonitor(probe, metrics="all").snapshot({"backbone": model}, step=0).layer("backbone")
    assert (attention.places, borders_of(attention, size)) == ("exact", borders)
    grid = len(borders[0]) - 1, len(borders[1]) - 1
    extra = {"interpolate_pos_encoding": True} if "ViTModel" in type(model).__name__ else {}
    matrix = attention_matrices(model, images, lambda m, x: m(x, **extra))[-1]
    assert attention.distance is not None
    torch.testing.assert_close(attention.distance.double(), distance(matrix, grid, borders), rtol=1e-3, atol=1e-2)


class Pyramid(nn.Module):
    """Attention over patches of 4 pixels, then over 2 × 2 of them; those left over are padded, or left out."""

    def __init__(self, pads: bool) -> None:
        super().__init__()
        self.pads = pads
        self.proj, self.merge = nn.Conv2d(3, DIM, 4, 4), nn.Linear(4 * DIM, DIM)
        self.first, self.second = Block(MemEffAttention()), Block(MemEffAttention())

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images)
        height, width = x.shape[-2:]
        x = self.first(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (height, width))
        x = F.pad(x, (0, width % 2, 0, height % 2)) if self.pads else x
        merged: Tensor = self.second(self.merge(F.unfold(x, 2, stride=2).transpose(1, 2)))
        return merged.mean(1)


@pytest.mark.parametrize("pads", [True, False])
def test_coarser_layers_of_a_pyramid(pads: bool) -> None:
    fine, coarse = record_attention(enliven(Pyramid(pads)).eval(), noise(36, 48), layers="all", query="mean")
    assert borders_of(fine, (36, 48)) == (whole(9, 36), whole(12, 48))
    assert borders_of(coarse, (36, 48)) == (steps(0, 5 if pads else 4, 36), whole(6, 48))
    assert coarse.places == "exact"


def test_where_patches_are_costs_three_images_at_most() -> None:
    """None where the convolution sees the image as it is."""

    def asked(name: str, size: tuple[int, int]) -> int:
        images: list[int] = []

        def counted(m: nn.Module, x: Tensor) -> Any:
            images.append(len(x))
            return m(x)

        record_attention(enliven(Inside(CASES[name][0], CASES[name][1])).eval(), noise(*size), forward=counted)
        return sum(images)

    plain = asked("drops", (32, 40))
    assert asked("drops", (39, 45)) == plain
    assert asked("pads left", (32, 37)) == plain + 3
    assert asked("crops", (40, 57)) <= plain + 3, "of a smaller grid"


@pytest.mark.parametrize("name", ["drops", "pads both sides", "crops"])
def test_a_perfect_mask_overlaps_perfectly(name: str) -> None:
    change, grid, size, borders = CASES[name]
    model, images = enliven(Inside(change, grid)).eval(), noise(*size)
    (attention,) = record_attention(model, images)
    mask = AF.mass_mask(attention.maps.flatten(-2), 0.6).unflatten(-1, attention.grid)[:, 0]
    truth = painted(mask, borders, size)[:, None]
    probe = ProbeBatch(images, mean=(0, 0, 0), std=(1, 1, 1), masks=truth)
    metrics = AttentionMonitor(probe).snapshot({"backbone": model}, step=0).metrics
    assert metrics["backbone", 1, "jaccard", 0] == 1
    assert metrics["backbone", 1, "jaccard_fixed_head", None] == 1


def painted(mask: Tensor, borders: Borders, size: tuple[int, int]) -> Tensor:
    """A mask of patches (B, gh, gw) in pixels, rectangle by rectangle."""
    pixels = torch.zeros(len(mask), *size, dtype=torch.bool)
    for image, row, col in mask.nonzero().tolist():
        (top, bottom), (left, right) = (axis[i : i + 2] for axis, i in zip(borders, (row, col), strict=True))
        pixels[image, round(top) : round(bottom), round(left) : round(right)] = True
    return pixels


def attention_at(
    geometry: GridGeometry | None, grid: tuple[int, int] = (4, 4), hot: int | None = None
) -> LayerAttention:
    rows = torch.full((1, 2, 1 + grid[0] * grid[1]), 0.01)
    if hot is not None:
        rows[..., 1 + hot] = 1.0
    rows = rows / rows.sum(-1, keepdim=True)
    return LayerAttention(0, "blocks.0", rows, 1, Grid(grid, geometry), False, 0.0, places="exact")


def snapshot_of(attention: LayerAttention) -> AttentionSnapshot:
    return AttentionSnapshot(0, 0, ("image0",), {("backbone", 0): attention})


DROPS = GridGeometry((0.0, 0.0), (16.0, 16.0))  # on 79 pixels
PADS = GridGeometry((-4.0, -4.0), (16.0, 16.0))  # on 56 pixels
CROPS = GridGeometry((8.0, 20.0), (16.0, 16.0))  # on 100 pixels


@pytest.mark.parametrize("geometry", [DROPS, CROPS, None])
def test_archives_keep_where_patches_are(geometry: GridGeometry | None, tmp_path: Path) -> None:
    snapshot = snapshot_of(attention_at(geometry))
    snapshot.save(tmp_path / "s.npz")
    for read in (AttentionSnapshot.load(tmp_path / "s.npz"), snapshot_from_state(snapshot_state(snapshot))):
        assert read.layer("backbone").geometry == geometry
    assert ("geometry" in snapshot_state(snapshot)["header"]) == (geometry is not None), "as files had it before"


@pytest.mark.parametrize("cell", ["[16, 0]", "[16]", '["a", 1]', "null"])
def test_a_geometry_that_is_none_is_refused(cell: str) -> None:
    state = snapshot_state(snapshot_of(attention_at(DROPS)))
    state["header"] = state["header"].replace('"cell": [16.0, 16.0]', f'"cell": {cell}')
    with pytest.raises(ArchiveError, match="cell="):
        snapshot_from_state(state)


@pytest.mark.parametrize(("geometry", "size"), [(DROPS, 79), (PADS, 56), (CROPS, 100)])
@pytest.mark.parametrize("hot", [0, 6, 15])
def test_a_patch_is_painted_on_its_own_pixels(geometry: GridGeometry, size: int, hot: int) -> None:
    """In panels, in single pictures and in videos."""
    y, x = (o + c * i for o, c, i in zip(geometry.origin, geometry.cell, divmod(hot, 4), strict=True))
    inside = np.zeros((size, size), bool)
    inside[max(0, round(y)) : round(y) + 16, max(0, round(x)) : round(x) + 16] = True
    seen = np.zeros((size, size), bool)
    (top, left) = (max(0, round(o)) for o in geometry.origin)
    seen[top : round(geometry.origin[0]) + 64, left : round(geometry.origin[1]) + 64] = True
    photo = np.where(inside[..., None], 255, 0).astype(np.uint8).repeat(3, -1)
    attention, grey = attention_at(geometry, hot=hot), np.full_like(photo, 120)
    maps = attention.maps[0].numpy()
    painter = CellPainter(photo, Grid((4, 4), geometry), DrawingOptions(), 16 * size // 16)
    assert painter.size == (size, size), "patches of 16 pixels, as in the photograph"
    assert (painter.photo[inside] > 250).mean() > 0.9
    bright = CellPainter(grey, Grid((4, 4), geometry), DrawingOptions(), size).paint(maps)[0].max(-1) > 150
    np.testing.assert_array_equal(bright, inside)
    drawing = PixelPictures(grey, Grid((4, 4), geometry), DrawingOptions())
    for picture in (drawing.heat_map(maps[0]), drawing.heat_map_over(maps[0])):
        np.testing.assert_array_equal(picture.max(-1) > 150, inside)
        assert picture[~seen].max(initial=0) < 90
    outlined = (drawing.masked(maps[0] > 0.5) == MASK).all(-1)
    rows, cols = np.nonzero(inside)
    where = np.nonzero(outlined)
    assert (where[0].min(), where[0].max(), where[1].min(), where[1].max()) == (
        rows.min(), rows.max(), cols.min(), cols.max()
    )  # fmt: skip
    options = DrawingOptions(cell=size)
    alone = CellPainter(grey, Grid((4, 4), geometry), options, size).paint(maps, maps > 0.5)[0]
    assert holds(FrameDrawing(options).draw(grey, [attention], 0), alone)
    assert holds(panel(snapshot_of(attention), 0, grey, options=options), alone)


def holds(canvas: np.ndarray[Any, Any], picture: np.ndarray[Any, Any]) -> bool:
    """Whether a picture is somewhere on a canvas, whose cells stand at multiples of 8 pixels."""
    height, width = picture.shape[:2]
    corners = itertools.product(range(0, canvas.shape[0], 8), range(0, canvas.shape[1], 8))
    return any(np.array_equal(canvas[y : y + height, x : x + width], picture) for y, x in corners)


def test_what_no_patch_sees_is_said_and_stays_the_same() -> None:
    photo = np.full((79, 79, 3), 120, np.uint8)
    one, other = (
        CellPainter(photo, Grid((4, 4), DROPS), DrawingOptions(), 79).paint(
            attention_at(DROPS, hot=hot).maps[0].numpy()
        )
        for hot in (0, 15)
    )
    assert (one[:, 64:] == other[:, 64:]).all()
    assert (one[:, :, 64:] == other[:, :, 64:]).all()
    assert not (one[:, :64, :64] == other[:, :64, :64]).all()
    assert attention_at(DROPS).grid.seen_share((79, 79)) == pytest.approx((64 / 79) ** 2)
    assert attention_at(None).grid.seen_share((79, 79)) == 1


def test_runs_whose_patches_are_elsewhere_are_not_compared(tmp_path: Path) -> None:
    for name, geometry in (("drops", DROPS), ("crops", GridGeometry((7.0, 7.0), (16.0, 16.0))), ("whole", None)):
        (tmp_path / name).mkdir()
        ProbeBatch(torch.zeros(1, 3, 79, 79)).save(tmp_path / name / "probe.npz")
        snapshot_of(attention_at(geometry, hot=5)).save(tmp_path / name / "step-000000000.npz")
    with pytest.raises(ArchiveError, match=r"its place of patches is 16 × 16 pixels each from .0, 0. on in"):
        compare_runs(tmp_path / "drops", tmp_path / "crops")
    with pytest.raises(ArchiveError, match=r"its place of patches is the whole image in"):
        compare_runs(tmp_path / "whole", tmp_path / "drops")


@pytest.mark.skipif(CHROMIUM is None or shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize(("geometry", "size"), [(DROPS, 79), (PADS, 56), (CROPS, 100)])
def test_the_player_shows_patches_where_they_are(geometry: GridGeometry, size: int, tmp_path: Path) -> None:
    """The patch below the pointer, none where no patch is, the colours of the picture, and overlap with an object."""
    hot, folder = 6, tmp_path / "archive"
    folder.mkdir()
    y, x = (o + c * i for o, c, i in zip(geometry.origin, geometry.cell, divmod(hot, 4), strict=True))
    truth = torch.zeros(1, 1, size, size, dtype=torch.bool)
    truth[..., round(y) : round(y) + 16, round(x) : round(x) + 16] = True
    probe = ProbeBatch(torch.zeros(1, 3, size, size), mean=(0.5,) * 3, std=(0.25,) * 3, masks=truth)
    probe.save(folder / "probe.npz")
    snapshot_of(attention_at(geometry, hot=hot)).save(folder / "step-000000000.npz")
    page_path = tmp_path / "page.html"
    report(str(folder), out=str(page_path))
    with browsing() as watched:
        page = watched.open(page_path, "truth=false&mask=false")
        canvas = page.locator("figure canvas").first
        box = canvas.bounding_box()

        def told(row: float, column: float) -> str:
            page.mouse.move(box["x"] + box["width"] * column / size, box["y"] + box["height"] * row / size)
            watched.settle()
            return str(page.locator(".patch h3").inner_text())

        assert told(y + 8, x + 8) == "Patch 1, 2"
        assert told(y + 1, x + 1) == "Patch 1, 2"
        assert told(y - 1, x + 17) == "Patch 0, 3"
        assert told(size - 1, size - 1) == ("Patch 3, 3" if geometry == PADS else "Patch")
        page.mouse.move(5, 5)
        watched.settle()
        picture = pixels_of(canvas)
        scale = picture.shape[0] / size
        rows, cols = np.nonzero(picture.max(-1) > 150)
        drawn = np.array([rows.min(), rows.max() + 1, cols.min(), cols.max() + 1]) / scale
        np.testing.assert_allclose(drawn, [y, y + 16, x, x + 16], atol=0.5)
        page = watched.open(page_path)
        assert "IoU 1.00" in page.locator("figcaption").first.inner_text()
        watched.check()
