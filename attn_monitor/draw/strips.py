"""The film strip: one probe image over the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from attn_monitor import functional as F
from attn_monitor.attention import LayerAttention
from attn_monitor.draw.canvas import GAP, HEADER, Pixels, blank_picture, draw_text, paste, up_to_block
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.frame import long_side
from attn_monitor.draw.legend import LEGEND, draw_legend
from attn_monitor.draw.maps import colors_or_missing, map_or_missing
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.slices import has_slices, slice_word
from attn_monitor.record.thinning import thin
from attn_monitor.snapshot import Snapshot

STRIP_COLUMNS, STRIP_CELL, STRIP_HEADS = 10, 64, 4
LONGEST_CELL = 3 * STRIP_CELL  # of a long image


def filmstrip(
    history: Sequence[Snapshot],
    image: int,
    photo: Pixels,
    *,
    layer: int = -1,
    options: DrawingOptions = DrawingOptions(),
) -> Pixels:
    """Draw one image's attention over time, with a column for each of up to ten steps.

    Of clips and volumes it is their mean, or the frame or slice that the options choose. Rows are each role's patch
    features as colours, if they are known, and head mean, then up to four heads of the last role: of more
    heads, those with the lowest entropy on this image at the end.

    Args:
        history: Snapshots in order of steps.
        image: Index of the probe image.
        photo: The image, uint8 (H, W, 3).
        layer: Layer; a negative one counts from the last.
        options: Colours and heads.

    Returns:
        A picture, uint8 (height, width, 3).
    """
    last, only = history[-1].in_plane(options.slice), options.slice
    chosen = [history[i].in_plane(only) for i in thin([s.step for s in history], STRIP_COLUMNS)]
    main = last.roles[-1]
    attention = last.layer(main, layer)
    heads = _most_concentrated(attention, image, options.drawn_heads)
    rows: list[tuple[str, int | None]] = [(role, None) for role in last.roles] + [(main, head) for head in heads]
    labels = [(role, "mean" if head is None else f"head {head}") for role, head in rows]
    missing = torch.full(attention.grid, math.nan)
    maps = torch.stack([torch.stack([map_or_missing(s, r, layer, image, h, missing) for s in chosen]) for r, h in rows])
    painter = CellPainter(photo, attention.grid, options, long_side(STRIP_CELL, photo, LONGEST_CELL))
    pictures = painter.paint(maps.numpy())  # (rows, steps, h, w, 3); too small for outlines
    features = _features(chosen, layer, image, painter)
    labels = [*((role, "features") for role in features), *labels]
    pictures = np.concatenate([*features.values(), pictures])
    whole = history[-1].layer(main, layer)
    part = (
        ""
        if only is None or not has_slices(whole)
        else f" · {slice_word(whole)} {min(only, whole.grid[0] - 1)} of {whole.grid[0]}"
    )
    title = f"{last.names[image]}{part} · layer {attention.layer} · steps {chosen[0].step:,} to {last.step:,}"
    return _compose(title, [s.step for s in chosen], labels, pictures, painter)


def _features(snapshots: Sequence[Snapshot], layer: int, image: int, painter: CellPainter) -> dict[str, Pixels]:
    """Draw the patch colours of each role that has some at the end, (1, steps, h, w, 3); black at steps without."""
    blank, last = torch.full((*painter.grid, 3), math.nan), snapshots[-1]
    found = {}
    for role in last.roles:
        colors = [colors_or_missing(s, role, layer, image, blank) for s in snapshots]
        if not colors[-1].isnan().any():
            found[role] = np.array([[painter.colors(one.nan_to_num().numpy()) for one in colors]])
    return found


def _most_concentrated(attention: LayerAttention, image: int, heads: tuple[int, ...] | None) -> list[int]:
    """Choose up to four heads in order: of more, those with the lowest entropy."""
    shown = list(heads or range(attention.rows.shape[1]))
    if len(shown) <= STRIP_HEADS:
        return shown
    entropy = F.entropy(attention.on_patches[image]).nan_to_num(2.0)
    return sorted(sorted(shown, key=lambda head: float(entropy[head]))[:STRIP_HEADS])


def _compose(
    title: str, steps: list[int], labels: list[tuple[str, str]], pictures: Pixels, painter: CellPainter
) -> Pixels:
    height, width = painter.size
    pitch_x, pitch_y = max(up_to_block(width), 5 * GAP) + GAP, max(up_to_block(height), 5 * GAP) + GAP
    margin = 13 * GAP
    left, top = margin + pitch_x, HEADER + 4 * GAP
    size = max(left + len(steps) * pitch_x, 58 * GAP), top + len(labels) * pitch_y + LEGEND
    canvas = blank_picture(*size)
    paste(canvas, margin, top, painter.photo)
    for row, shown in enumerate(pictures):
        for column, picture in enumerate(shown):
            paste(canvas, left + column * pitch_x, top + row * pitch_y, picture)
    strip = Image.fromarray(canvas)
    draw_text(strip, (GAP, 7), title, 21)
    draw_text(strip, (left - 2 * GAP, top - 23), "step", 18, anchor="r")
    for column, step in enumerate(steps):
        draw_text(strip, (left + column * pitch_x + width / 2, top - 23), short_step(step), 18, anchor="m")
    for row, label in enumerate(labels):
        for line, text in enumerate(label):
            draw_text(strip, (GAP, top + row * pitch_y + 8 + 22 * line), text, 18)
    draw_legend(strip, top + len(labels) * pitch_y + 6, painter.options, masks=False, larger_text=3)
    return np.asarray(strip)


def short_step(step: int) -> str:
    """Format a step in about five characters: 950, 12,500, 1.25M."""
    if step < 100_000:
        return f"{step:,}"
    return f"{step / 1000:.0f}k" if step < 1_000_000 else f"{step / 1_000_000:.3g}M"
