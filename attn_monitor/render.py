"""Draw snapshots as uint8 pictures with NumPy and Pillow: panels, film strips, animations.

The default colour scale is fixed in units of uniform attention (weight × number of patches), so that two steps can be
compared: near-uniform attention looks flat instead of being stretched into a pattern. The photograph lies beneath in
dim grey, and DINO's mass mask is an outline.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from attn_monitor import functional as F
from attn_monitor.capture import LayerAttention
from attn_monitor.snapshot import AttentionSnapshot

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

LOW, HIGH = -1.0, 5.0  # log2 of the colour scale's ends: half of uniform to 32 times uniform
SCALES = ("uniform", "minmax")

BACKGROUND = (18, 18, 22)
TEXT, DIM = (236, 236, 240), (150, 150, 160)
MASK, TRUTH, MISSING = (64, 224, 255), (120, 255, 80), (90, 30, 30)
GAP, CAPTION = 6, 17


@dataclass(frozen=True)
class Style:
    """How panels are drawn. ``heads`` limits which are shown (None: all); ``scale`` is "uniform" or "minmax"."""

    threshold: float = 0.6
    scale: str = "uniform"
    heads: tuple[int, ...] | None = None
    cell: int = 128

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f'scale={self.scale!r}: expected "uniform" (fixed, comparable) or "minmax" (DINO\'s look)')


@functools.lru_cache(maxsize=1)
def _colours() -> Pixels:
    import matplotlib  # only its table is used; importing it takes a while

    table: Pixels = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    return table


@functools.lru_cache(maxsize=8)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def cell_size(grid: tuple[int, int], target: int) -> tuple[int, int]:
    """Height and width in pixels of a map near the target size, in which each patch is a square of whole pixels."""
    patch = max(1, round(target / max(grid)))
    return grid[0] * patch, grid[1] * patch


def _intensity(maps: np.ndarray[Any, Any], scale: str) -> np.ndarray[Any, Any]:
    """Position on the colour scale, 0…1, of weights (..., gh, gw)."""
    if scale == "minmax":
        low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
        return np.asarray((maps - low) / np.maximum(high - low, 1e-12))
    units = maps * (maps.shape[-1] * maps.shape[-2])
    return np.asarray(np.clip((np.log2(np.maximum(units, 1e-12)) - LOW) / (HIGH - LOW), 0, 1))


def overlay(maps: np.ndarray[Any, Any], grey: np.ndarray[Any, Any], *, scale: str = "uniform") -> Pixels:
    """Colour maps (..., gh, gw) over a grey photograph (h, w); patches stay squares. Returns (..., h, w, 3).

    Where a map is not finite, the cell is filled with a dull red: missing, never zero.
    """
    height, width = grey.shape
    finite = np.isfinite(maps).all((-2, -1))
    level = _intensity(np.nan_to_num(maps, posinf=0, neginf=0), scale)
    level = level.repeat(height // maps.shape[-2], -2).repeat(width // maps.shape[-1], -1)[..., None]
    colour = _colours()[(level[..., 0] * 255).astype(np.uint8)]
    opacity = 0.45 + 0.5 * level
    mixed = (1 - opacity) * (grey * 0.62)[..., None] + opacity * colour
    mixed[~finite] = MISSING
    return np.asarray(mixed.round().clip(0, 255).astype(np.uint8))


def outline(picture: Pixels, mask: np.ndarray[Any, Any], colour: tuple[int, int, int], width: int = 1) -> None:
    """Draw the inner border of bool masks (..., h, w) onto pictures (..., h, w, 3), in place."""
    inside = mask.copy()
    for _ in range(width):
        padded = np.pad(inside, [(0, 0)] * (mask.ndim - 2) + [(1, 1), (1, 1)])
        h, w = mask.shape[-2:]
        inside = inside & padded[..., :h, 1:-1] & padded[..., 2:, 1:-1] & padded[..., 1:-1, :w] & padded[..., 1:-1, 2:]
    picture[mask & ~inside] = colour


def _resize(photo: Pixels, size: tuple[int, int], resample: Image.Resampling) -> Pixels:
    return np.asarray(Image.fromarray(photo).resize((size[1], size[0]), resample))


class _Drawer:
    """One image's cells: shares the photograph, its grey version and the masks between panel and strip."""

    def __init__(
        self,
        photo: Pixels,
        truth: np.ndarray[Any, Any] | None,
        grid: tuple[int, int],
        style: Style,
        cell: int,
    ):
        self.size = cell_size(grid, cell)
        self.style = style
        self.photo = _resize(photo, self.size, Image.Resampling.LANCZOS).copy()
        # A little soft: the photograph is there to place the attention, and sharp texture fills the event file.
        grey = Image.fromarray(self.photo).convert("L").filter(ImageFilter.GaussianBlur(0.7))
        self.grey: np.ndarray[Any, Any] = np.asarray(grey, dtype=np.float32)
        self.truth: list[np.ndarray[Any, Any]] = []
        for mask in truth if truth is not None else ():
            shown = _resize((mask * 255).astype(np.uint8), self.size, Image.Resampling.NEAREST) > 0
            if shown.any():
                self.truth.append(shown)
        self._outline_truth(self.photo)

    def _outline_truth(self, picture: Pixels) -> None:
        for mask in self.truth:
            outline(picture, np.broadcast_to(mask, picture.shape[:-1]), TRUTH)

    def cells(self, maps: np.ndarray[Any, Any], masks: np.ndarray[Any, Any]) -> Pixels:
        """(H, gh, gw) maps and mass masks to (H, h, w, 3) pictures."""
        pictures = overlay(maps, self.grey, scale=self.style.scale)
        self._outline_truth(pictures)
        factor = self.size[0] // maps.shape[-2]
        outline(pictures, masks.repeat(factor, -2).repeat(factor, -1), MASK, width=2 if factor > 6 else 1)
        return pictures


def _with_mean(attention: LayerAttention, image: int, style: Style) -> tuple[list[str], Any, Any, Any, Any]:
    """Labels, maps, masks, entropies and mask areas of the head mean followed by the heads shown."""
    maps = attention.maps[image]  # (H, gh, gw)
    heads = [h for h in (style.heads or range(len(maps))) if h < len(maps)]
    labels = ["head mean", *(f"head {h}" for h in heads)]
    stacked = np.concatenate([maps.mean(0, keepdim=True).numpy(), maps[heads].numpy()])
    p = torch.from_numpy(stacked).flatten(-2)
    masks = F.mass_mask(p, style.threshold)
    areas = F.mask_area(p, style.threshold).tolist()
    return labels, stacked, masks.unflatten(-1, attention.grid).numpy(), F.entropy(p).tolist(), areas


def _caption(label: str, entropy: float, area: float) -> str:
    return f"{label} · missing" if math.isnan(entropy) else f"{label} · H {entropy:.2f} · {area:.0%}"


def panel(
    snapshot: AttentionSnapshot,
    image: int,
    photo: Pixels,
    *,
    layer: int = -1,
    truth: np.ndarray[Any, Any] | None = None,
    style: Style = Style(),
) -> Pixels:
    """One probe image at one step: for each role the original, the head mean and every head, (height, width, 3).

    Captions give the head, its entropy (H, 1 is uniform) and the share of patches in its mass mask.
    """
    roles = [r for r in snapshot.roles if _has_layer(snapshot, r, layer)]
    shown = {role: snapshot.layer(role, layer) for role in roles}
    rows: list[tuple[str, list[tuple[str, Pixels]]]] = []
    for role, attention in shown.items():
        drawer = _Drawer(photo, truth, attention.grid, style, style.cell)
        labels, maps, masks, entropies, areas = _with_mean(attention, image, style)
        cells = [("original", drawer.photo)]
        captions = [_caption(*c) for c in zip(labels, entropies, areas, strict=True)]
        cells += list(zip(captions, drawer.cells(maps, masks), strict=True))
        mixed = " · mixed after the softmax" if attention.mixed else ""
        rows.append((f"{role} · layer {attention.layer} ({attention.name}){mixed}", cells))
    header = f"{snapshot.names[image]} · step {snapshot.step:,} · epoch {snapshot.epoch}"
    return _compose(header, rows, style)


def _has_layer(snapshot: AttentionSnapshot, role: str, layer: int) -> bool:
    captured = snapshot.layers_of(role)
    return layer in captured or (layer < 0 and -layer <= len(captured))


def columns_for(cells: int, roles: int, height: int, width: int) -> int:
    """Cells per line, so that the whole panel comes out near 3:2 with as few empty places as possible."""

    def cost(columns: int) -> float:
        lines = math.ceil(cells / columns)
        aspect = columns * (width + GAP) / (roles * (lines * (height + CAPTION + GAP) + CAPTION))
        return abs(math.log(aspect / 1.5)) + 0.6 * (lines * columns - cells) / cells

    return min(range(min(cells, 3), cells + 1), key=cost)


def _compose(header: str, rows: list[tuple[str, list[tuple[str, Pixels]]]], style: Style) -> Pixels:
    height, width = rows[0][1][0][1].shape[:2]
    most = max(len(cells) for _, cells in rows)
    columns = columns_for(most, len(rows), height, width)
    lines = [math.ceil(len(cells) / columns) for _, cells in rows]
    total_width = max(columns * (width + GAP) + GAP, 420)
    line_height = height + CAPTION + GAP
    total_height = 30 + sum(24 + n * line_height for n in lines) + 44
    canvas = Image.new("RGB", (total_width, total_height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 6), header, TEXT, _font(17))
    top = 30
    for (title, cells), count in zip(rows, lines, strict=True):
        draw.text((GAP, top + 3), title, MASK, _font(15))
        top += 24
        for index, (caption, picture) in enumerate(cells):
            x, y = GAP + index % columns * (width + GAP), top + index // columns * line_height
            canvas.paste(Image.fromarray(picture), (x, y))
            _fitted_text(draw, (x, y + height + 2), caption, width)
        top += count * line_height
    _legend(canvas, draw, top + 8, style)
    return np.asarray(canvas)


def _fitted_text(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int) -> None:
    for size in (13, 12, 11, 10, 9):
        if draw.textlength(text, _font(size)) <= width:
            break
    draw.text(at, text, TEXT, _font(size))


def _legend(canvas: Image.Image, draw: ImageDraw.ImageDraw, top: int, style: Style) -> None:
    """Colour bar in units of uniform attention, and what the outlines are."""
    bar = min(240, canvas.width // 3)
    table = _colours()[np.linspace(0, 255, bar).astype(np.uint8)]
    canvas.paste(Image.fromarray(np.broadcast_to(table, (10, bar, 3)).copy()), (GAP, top))
    ticks = ["0.5", "1", "2", "4", "8", "16", "32"] if style.scale == "uniform" else ["min", "max"]
    for index, tick in enumerate(ticks):
        x = GAP + index * (bar - 1) / (len(ticks) - 1)
        anchor = "l" if index == 0 else "r" if index == len(ticks) - 1 else "m"
        draw.text((x, top + 12), tick, DIM, _font(12), anchor=f"{anchor}a")
    x = GAP * 3 + bar
    unit = "x uniform attention" if style.scale == "uniform" else "each map for itself"
    draw.text((x, top - 3), unit, DIM, _font(13))
    draw.rectangle((x, top + 15, x + 10, top + 25), outline=MASK, width=2)
    draw.text((x + 16, top + 12), f"top {style.threshold:.0%} of attention (area in %)", DIM, _font(13))


def filmstrip(
    history: Sequence[AttentionSnapshot],
    image: int,
    photo: Pixels,
    *,
    layer: int = -1,
    columns: int = 9,
    cell: int = 72,
    style: Style = Style(),
) -> Pixels:
    """One image's attention over time: a column for each step (thinned to ``columns``), (height, width, 3).

    Rows are each role's head mean, then the last role's heads (the teacher's): all up to four, else the four whose
    attention is most concentrated at the end.
    """
    last = history[-1]
    chosen = [history[i] for i in thin([s.step for s in history], columns)]
    main = last.roles[-1]
    attention = last.layer(main, layer)
    heads = list(style.heads or range(attention.rows.shape[1]))
    if len(heads) > 4:
        by_entropy = F.entropy(attention.maps[image].flatten(-2))[heads].nan_to_num(2.0).argsort()[:4].tolist()
        heads = sorted(heads[i] for i in by_entropy)
    drawer = _Drawer(photo, None, attention.grid, style, cell)
    lines = [
        (f"{role}\nhead mean", [_time_cell(s, role, layer, image, None, drawer) for s in chosen]) for role in last.roles
    ]
    lines += [(f"{main}\nhead {h}", [_time_cell(s, main, layer, image, h, drawer) for s in chosen]) for h in heads]
    title = f"{last.names[image]} · layer {attention.layer} · steps {chosen[0].step:,} to {last.step:,}"
    return _compose_strip(title, [s.step for s in chosen], lines, drawer, style)


def _time_cell(
    snapshot: AttentionSnapshot, role: str, layer: int, image: int, head: int | None, drawer: _Drawer
) -> Pixels:
    blank: Pixels = np.full((*drawer.size, 3), MISSING, np.uint8)
    if not _has_layer(snapshot, role, layer) or image >= len(snapshot.rows(role, layer)):
        return blank
    attention = snapshot.layer(role, layer)
    maps = attention.maps[image]
    if drawer.size[0] % attention.grid[0] or drawer.size[1] % attention.grid[1]:
        return blank
    shown: torch.Tensor = maps.mean(0) if head is None else maps[head]
    mask = F.mass_mask(shown.flatten(), drawer.style.threshold).unflatten(-1, attention.grid)
    return drawer.cells(shown.numpy()[None], mask.numpy()[None])[0]  # type: ignore[no-any-return]


def _compose_strip(
    title: str, steps: list[int], lines: list[tuple[str, list[Pixels]]], drawer: _Drawer, style: Style
) -> Pixels:
    height, width = drawer.size
    label = 78
    left = label + width + 2 * GAP
    canvas = Image.new(
        "RGB",
        (max(left + len(steps) * (width + 3) + GAP, 460), 52 + len(lines) * (height + 3) + 46),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 6), title, TEXT, _font(16))
    canvas.paste(Image.fromarray(drawer.photo), (label, 52))
    for column, step in enumerate(steps):
        x = left + column * (width + 3)
        draw.text((x + width / 2, 32), f"{'step ' if column == 0 else ''}{step:,}", TEXT, _font(13), anchor="ma")
    for row, (name, cells) in enumerate(lines):
        y = 52 + row * (height + 3)
        draw.multiline_text((GAP, y + 4), name, TEXT, _font(13))
        for column, picture in enumerate(cells):
            canvas.paste(Image.fromarray(picture), (left + column * (width + 3), y))
    _legend(canvas, draw, 52 + len(lines) * (height + 3) + 8, style)
    return np.asarray(canvas)


def thin(steps: Sequence[int], count: int) -> list[int]:
    """At most ``count`` indices into ``steps``, spread evenly over the steps, first and last included."""
    if len(steps) <= count:
        return list(range(len(steps)))
    goals = np.linspace(steps[0], steps[-1], count)
    return sorted({int(np.abs(np.asarray(steps) - goal).argmin()) for goal in goals})


def encode_jpeg(picture: Pixels, quality: int = 70) -> bytes:
    """JPEG without chroma subsampling, which would blur outlines and text."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()


def encode_gif(frames: Sequence[Pixels], seconds: float = 0.4) -> bytes:
    """An endless animation of pictures of one size, holding its last frame a little longer."""
    images = [Image.fromarray(f).quantize(128) for f in frames]
    durations = [int(seconds * 1000)] * (len(frames) - 1) + [int(seconds * 4000)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return buffer.getvalue()
