"""Compare two runs on one probe image: their maps, and the difference in units of uniform attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attn_monitor.draw.canvas import (
    DIM_TEXT,
    GAP,
    HEADER,
    LINE,
    MASK,
    MISSING,
    Array,
    Colour,
    Pixels,
    blank_picture,
    draw_colour_bar,
    draw_text,
    draw_text_within,
    up_to_block,
)
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.legend import LEGEND, draw_legend
from attn_monitor.draw.maps import map_captions, map_statistics, mean_and_heads
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.scales import GREY
from attn_monitor.snapshot import Snapshot

COLOURS: tuple[Colour, Colour] = (255, 160, 40), (70, 170, 255)
"""Colours of the two runs, in charts and where one has more attention; safe for colour-blind readers."""

RANGE = 4.0  # log2(1 + |difference|) at the ends of the colour scale: 15 times uniform attention
TICKS = "15", "7", "3", "1", "0", "1", "3", "7", "15"
OPACITY = 1.3, 0.95  # of a colour over the photograph: for each unit of its position on the scale, and at most
BRIGHTNESS = 0.45  # of a colour where the difference is zero, 1 at the ends
MARGIN, SHEET_WIDTH, CELL = 6 * GAP, 1800, 160  # pixels: letters of rows, all columns about, a cell at most


Row = tuple[str, list[str], Pixels]
"""A row's label, and captions and pictures (columns, h, w, 3) of the head mean and the heads."""


class Section(NamedTuple):
    """One layer in both runs: a title, the image and three rows."""

    title: str
    photo: Pixels
    rows: list[Row]

    @property
    def pitch(self) -> tuple[int, int]:
        """Distance between cells in pixels, (down, across)."""
        height, width = self.photo.shape[:2]
        return up_to_block(height) + LINE + GAP, up_to_block(width) + GAP

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        down, across = self.pitch
        return 2 * LINE + len(self.rows) * down, MARGIN + (1 + len(self.rows[0][1])) * across + GAP


def comparison(
    pair: tuple[Snapshot, Snapshot],
    names: tuple[str, str],
    image: int,
    photo: Pixels,
    layers: Sequence[tuple[str, int]],
    *,
    truth: Array | None = None,
    options: DrawingOptions = DrawingOptions(),
) -> Pixels:
    """Compare two runs, A and B, on one probe image: three rows per layer, A, B and B - A.

    Columns are the head mean and the heads. Captions of A and B give entropy and mask area as in panels; those of the
    difference give the share of attention that is elsewhere, half the sum of absolute differences.

    Args:
        pair: Snapshots of A and B.
        names: Names of A and B.
        image: Index of the probe image.
        photo: The image, uint8 (H, W, 3).
        layers: (role, layer) to compare.
        truth: Ground-truth objects to outline, bool (objects, H, W).
        options: Colours of the maps.

    Returns:
        A picture, uint8 (height, width, 3).
    """
    pair = pair[0].in_plane(), pair[1].in_plane()
    sections = [_section(pair, key, image, photo, truth, options) for key in layers]
    width = max(80 * GAP, *(section.size[1] for section in sections))
    top = HEADER + 3 * LINE
    canvas = Image.fromarray(blank_picture(width, top + sum(section.size[0] for section in sections) + 2 * LEGEND))
    draw_text(canvas, (GAP, 7), pair[0].names[image], 17)
    for number, (letter, name, snapshot) in enumerate(zip("AB", names, pair, strict=True)):
        text = f"{letter}: {name} · step {snapshot.step:,} · epoch {snapshot.epoch}"
        draw_text_within(canvas, (GAP, HEADER + number * 20), text, width - 2 * GAP, 15, COLOURS[number])
    for section in sections:
        _draw_section(canvas, top, section)
        top += section.size[0]
    draw_legend(canvas, top + 6, options, truth=truth is not None and bool(truth.any()))
    _draw_difference_legend(canvas, top + LEGEND + 6)
    return np.asarray(canvas)


def _section(
    pair: tuple[Snapshot, Snapshot],
    key: tuple[str, int],
    image: int,
    photo: Pixels,
    truth: Array | None,
    options: DrawingOptions,
) -> Section:
    attention = pair[0].layer(*key)
    both = [mean_and_heads(snapshot.maps(*key)[image], options.drawn_heads) for snapshot in pair]
    labels = both[0][1]
    side = min(CELL, SHEET_WIDTH // (len(labels) + 1))
    painter = CellPainter(photo, attention.grid, options, side, truth)
    rows: list[Row] = []
    for letter, (maps, _) in zip("AB", both, strict=True):
        statistics = map_statistics(maps, options.threshold)
        pictures = painter.paint(maps.numpy(), statistics.mask.numpy())
        captions = map_captions(labels if letter == "A" else [""] * len(labels), maps, statistics)
        rows.append((letter, captions, pictures))
    change = both[1][0] - both[0][0]
    moved = (change.abs().sum((-2, -1)) / 2).tolist()
    captions = [f"{share:.0%} elsewhere" if math.isfinite(share) else "missing" for share in moved]
    rows.append(("B - A", captions, painter.put(difference_overlay(change, painter.frame.cut(painter.grey)))))
    return Section(f"{key[0]} · layer {key[1]} ({attention.name})", painter.photo, rows)


def difference_overlay(change: Tensor, grey: Array) -> Pixels:
    """Colour differences of weights (..., gh, gw) over a grey photograph (h, w). Returns (..., h, w, 3).

    The opacity grows with log2(1 + |difference · number of patches|), up to 15 times uniform attention. A difference
    that is not finite is painted dull red as a whole.
    """
    level = difference_level(change)
    finite = torch.isfinite(change).all(-1).all(-1).numpy()
    patch = grey.shape[0] // change.shape[-2], grey.shape[1] // change.shape[-1]
    enlarged = level.nan_to_num().numpy().repeat(patch[0], -2).repeat(patch[1], -1)
    pictures = _colours(enlarged, grey.astype(np.float32)[..., None] * GREY)
    pictures[~finite] = MISSING
    return pictures


def difference_level(change: Tensor) -> Tensor:
    """Scale differences of weights (..., gh, gw) to -1 (A has 15 times uniform attention more) to 1 (B has)."""
    units = change * (change.shape[-1] * change.shape[-2])
    return (units.sign() * torch.log2(1 + units.abs()) / RANGE).clamp(-1, 1)


def _colours(level: Array, below: Array) -> Pixels:
    """Blend levels -1 to 1, (...), in the colour of the run that has more with a background. Returns (..., 3)."""
    strength = np.abs(level)[..., None]
    colour = np.where(level[..., None] < 0, *np.array(COLOURS, np.float32))
    opacity = np.minimum(OPACITY[1], OPACITY[0] * strength)
    colour = colour * (BRIGHTNESS + (1 - BRIGHTNESS) * strength)
    pictures: Pixels = (below * (1 - opacity) + colour * opacity).astype(np.uint8)
    return pictures


def _draw_section(canvas: Image.Image, top: int, section: Section) -> None:
    draw_text_within(canvas, (GAP, top), section.title, canvas.width - 2 * GAP, 15, MASK)
    height, width = section.photo.shape[:2]
    down, across = section.pitch
    y = top + 3 * GAP
    canvas.paste(Image.fromarray(section.photo), (MARGIN, y))
    for letter, captions, pictures in section.rows:
        draw_text(canvas, (GAP, y + 4), letter, 15, {"A": COLOURS[0], "B": COLOURS[1]}.get(letter, DIM_TEXT))
        for column, (caption, picture) in enumerate(zip(captions, pictures, strict=True), 1):
            x = MARGIN + column * across
            canvas.paste(Image.fromarray(picture), (x, y))
            draw_text_within(canvas, (x, y + height + 2), caption, width + GAP - 2, 13)
        y += down


def _draw_difference_legend(canvas: Image.Image, top: int) -> None:
    bar = min(360, canvas.width // 2)
    colours = _colours(np.linspace(-1, 1, bar, dtype=np.float32), np.float32(80))
    draw_colour_bar(canvas, (GAP, top), colours, TICKS, 12)
    x = bar + 3 * GAP
    draw_text(canvas, (x, top - 4), "B - A: × uniform attention more in", 13, DIM_TEXT)
    draw_text(canvas, (x, top + 13), "A", 13, COLOURS[0])
    draw_text(canvas, (x + 20, top + 13), "B", 13, COLOURS[1])
    draw_text(canvas, (x + 44, top + 13), "% elsewhere: half the sum of differences", 13, DIM_TEXT)
