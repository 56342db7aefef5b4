"""The panel: one probe image at one step, with every head of every role.

The default colour scale is fixed in units of uniform attention (weight × number of patches), so that two steps can be
compared: near-uniform attention looks flat instead of being stretched into a pattern. The photograph lies beneath in
dim grey, and DINO's mass mask is an outline.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from attn_monitor.attention import LayerAttention
from attn_monitor.draw.canvas import (
    GAP,
    HEADER,
    LINE,
    MASK,
    Array,
    Pixels,
    blank_picture,
    draw_text,
    draw_text_within,
    in_lines,
    paste,
    up_to_block,
)
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.frame import long_side
from attn_monitor.draw.legend import LEGEND, draw_legend
from attn_monitor.draw.maps import has_layer, map_captions, map_statistics, mean_and_heads
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.slices import shown_slices, slice_cells, slice_word
from attn_monitor.snapshot import Snapshot

PANEL_PIXELS, LARGEST_CELL = 480_000, 320  # pixels of all cells together, largest side of one
LONGEST_CELL, CAPTION = 2 * LARGEST_CELL, 15 * GAP  # longest side of one of a long image, least width of a caption

_AXES = {"f": "frequency", "t": "time", "c": "channels", "h": "rows", "w": "columns", "d": "slices"}

Cell = tuple[str, Pixels]
"""A caption and the picture above it."""


def panel(
    snapshot: Snapshot,
    image: int,
    photo: Pixels,
    *,
    layer: int = -1,
    truth: Array | None = None,
    caption: str = "original",
    header: str | None = None,
    hatched: Array | None = None,
    options: DrawingOptions = DrawingOptions(),
    pixels: int = PANEL_PIXELS,
    frames: Pixels | None = None,
) -> Pixels:
    """Draw one probe image at one step: for each role the original, patch features, head mean and heads.

    Features are those that enter the layer's block, as colours, if they are known. A map's caption gives the head, its
    entropy (H, 1 is uniform) and the share of patches in its mass mask, or "uniform".

    Args:
        snapshot: The snapshot.
        image: Index of the probe image.
        photo: The image, uint8 (H, W, 3).
        layer: Layer; a negative one counts from the last.
        truth: Ground-truth objects to outline, bool (objects, H, W).
        caption: Caption of the original.
        header: First line; by default the image's name and the step.
        hatched: Patches that were left out of the snapshot's maps, bool (gh, gw).
        options: Colours, heads and size of the maps.
        pixels: Approximate number of pixels of all cells together.
        frames: Frames of a clip or slices of a volume, uint8 (frames, H, W, 3), which are shown below their mean.

    Returns:
        A picture, uint8 (height, width, 3).
    """
    rows: list[tuple[str, list[Cell]]] = []
    painters: dict[tuple[object, ...], CellPainter] = {}  # shared by roles, as resizing a photo takes time
    for role in snapshot.roles:
        if not has_layer(snapshot, role, layer):
            continue
        whole = snapshot.layer(role, layer)
        attention = whole.in_plane()
        maps, labels = mean_and_heads(attention.maps[image], options.drawn_heads)
        slices = shown_slices(whole)
        count = len(labels) + 1 + (attention.colors is not None) + len(slices) + bool(slices)
        side = options.cell or round(math.sqrt(pixels / count / len(snapshot.roles)))
        if options.cell is None:
            side = long_side(min(side, LARGEST_CELL), photo, LONGEST_CELL)
        key = attention.grid, attention.geometry, side
        if key not in painters:
            painters[key] = CellPainter(photo, attention.grid, options, side, truth)
        statistics = map_statistics(maps, options.threshold)
        captions = map_captions(labels, maps, statistics)
        pictures = painters[key].paint(maps.numpy(), statistics.mask.numpy(), hatched)
        cells = [(caption, painters[key].photo), *zip(captions, pictures, strict=True)]
        if attention.colors is not None:
            colors = attention.colors[image].unflatten(0, attention.grid).numpy()
            cells.insert(1, (f"PCA of layer {attention.layer}'s input", painters[key].colors(colors)))
        left_out = 0 if hatched is None else int(hatched.sum())
        unseen = 1 - attention.grid.seen_share((photo.shape[0], photo.shape[1]))
        rows.append((layer_title(attention, role, left_out, unseen), cells))
        if slices:
            title = f"{role} · mean of heads in each {slice_word(whole)}, with its share of attention"
            rows.append((title, slice_cells(whole, image, photo, frames, options, side)))
    header = header or f"{snapshot.names[image]} · step {snapshot.step:,} · epoch {snapshot.epoch}"
    return _compose(header, rows, options, truth is not None and bool(truth.any()))


def layer_title(attention: LayerAttention, role: str = "", left_out: int = 0, unseen: float = 0.0) -> str:
    """Write the title of a layer's maps: role, model, layer, and each deviation from the CLS query's plain softmax.

    Args:
        attention: The layer.
        role: Role of the model.
        left_out: Number of hatched patches.
        unseen: Share of the image that no patch covers, 0 to 1.
    """
    who = " ".join(filter(None, (role, attention.model)))
    parts = [*filter(None, [who]), f"layer {attention.layer} ({attention.name})"]
    if attention.query not in ("", "cls"):
        parts.append("what patches receive" if attention.query == "mean" else attention.query)
    if attention.mixed:
        parts.append("mixed after the softmax")
    if attention.kind != "distribution":
        parts.append({"weights": "weights that do not sum to 1", "signed": "some weights are negative"}[attention.kind])
    if attention.grid.axes not in (("h", "w"), ("", "t")) and len(attention.grid) == 2:
        down, right = (_AXES.get(axis, axis) for axis in attention.grid.axes)
        parts.append(f"{down} downwards, {right} to the right")
    if left_out:
        parts.append(f"{left_out} outlier{'s' * (left_out > 1)} left out (hatched)")
    if unseen > 1e-6:
        parts.append(f"{unseen:.1%} of the image in no patch (dark)")
    return " · ".join(parts)


def columns_for(cells: int, roles: int, height: int, width: int, wanted: float = 0.9) -> int:
    """Choose the number of cells per line for an aspect ratio near ``wanted`` with few empty places.

    Args:
        cells: Largest number of cells of a role.
        roles: Number of roles.
        height: Height of a cell in pixels.
        width: Width of a cell in pixels.
        wanted: Width / height of the picture; panels are nearly square, to be readable on a dashboard's card.
    """

    def cost(columns: int) -> float:
        lines = math.ceil(cells / columns)
        aspect = columns * (width + GAP) / (roles * (lines * (height + LINE + GAP) + LINE))
        return abs(math.log(aspect / wanted)) + 1.2 * (lines * columns - cells) / cells

    return min(range(min(cells, 3), cells + 1), key=cost)


def _compose(header: str, rows: list[tuple[str, list[Cell]]], options: DrawingOptions, truth: bool) -> Pixels:
    height, width = rows[0][1][0][1].shape[:2]
    most = max(len(cells) for _, cells in rows)
    columns = columns_for(most, len(rows), height, width)
    lines = [math.ceil(len(cells) / columns) for _, cells in rows]
    # A dashboard shrinks wide panels more, so their text is larger.
    line, larger = (3 * GAP, 5) if width >= 20 * GAP else (LINE, 0)
    pitch_x, pitch_y = up_to_block(width) + GAP, up_to_block(height) + line + GAP
    if height > 2 * width:  # a long spectrogram
        pitch_x = max(pitch_x, CAPTION + GAP)
    header_height = up_to_block(HEADER + larger)
    size = max(columns * pitch_x + GAP, 53 * GAP), header_height + LEGEND
    wrapped = [in_lines(title, size[0] - 2 * GAP, 15 + larger) for title, _ in rows]
    below = sum(len(parts) * line + GAP + n * pitch_y for parts, n in zip(wrapped, lines, strict=True))
    pictures = blank_picture(size[0], size[1] + below)
    top, titles, captions = header_height, [], []
    for (_, cells), parts, count in zip(rows, wrapped, lines, strict=True):
        titles += [(top + 2 + n * line, text) for n, text in enumerate(parts)]
        top += len(parts) * line + GAP
        for index, (caption, picture) in enumerate(cells):
            x, y = GAP + index % columns * pitch_x, top + index // columns * pitch_y
            paste(pictures, x, y, picture)
            captions.append(((x, y + height + 2), caption))
        top += count * pitch_y
    canvas = Image.fromarray(pictures)
    draw_text(canvas, (GAP, 7), header, 17 + larger)
    for y, title in titles:
        draw_text_within(canvas, (GAP, y), title, size[0] - 2 * GAP, 15 + larger, MASK)
    for at, caption in captions:
        draw_text_within(canvas, at, caption, pitch_x - 2, 13 + larger)
    draw_legend(canvas, top + 6, options, truth=truth, larger_text=larger)
    return np.asarray(canvas)
