"""Draw snapshots: a panel for one step, a film strip for all steps so far, a time-lapse of all images.

The default colour scale is fixed in units of uniform attention (weight × number of patches), so that two steps can be
compared: near-uniform attention looks flat instead of being stretched into a pattern. The photograph lies beneath in
dim grey, and DINO's mass mask is an outline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.draw import canvas as drawing
from attn_monitor.draw.canvas import GAP, LEGEND, LINE, MASK, TEXT, Array, Cells, Pixels, Style, up_to_block
from attn_monitor.record.history import thin
from attn_monitor.record.snapshot import AttentionSnapshot

PANEL_PIXELS, LARGEST_CELL = 480_000, 320  # of all cells together, and the side of one
TIMELAPSE_CELL = 128
STRIP_COLUMNS, STRIP_CELL, STRIP_HEADS = 10, 64, 4
HEADER = 4 * GAP
UNIFORM = 0.995
"""Entropy above which attention is practically uniform, and written as 1.00: which patches are largest is noise."""
_QUERIES = {"mean": "what patches receive"}


def panel(
    snapshot: AttentionSnapshot,
    image: int,
    photo: Pixels,
    *,
    layer: int = -1,
    truth: Array | None = None,
    caption: str = "original",
    style: Style = Style(),
) -> Pixels:
    """One probe image at one step: for each role the original, the head mean and every head, (height, width, 3).

    ``truth`` are ground-truth objects, bool (objects, H, W); ``caption`` is that of the image itself. The others give
    the head, its entropy (H, 1 is uniform) and the share of patches in its mass mask, "uniform" where there is none.
    """
    rows: list[tuple[str, list[tuple[str, Pixels]]]] = []
    known: dict[tuple[tuple[int, int], int], Cells] = {}  # roles mostly share one: the photograph is resized once
    for role in snapshot.roles:
        if not _has_layer(snapshot, role, layer):
            continue
        attention = snapshot.layer(role, layer)
        maps, labels = _mean_and_heads(attention.maps[image], style.heads)
        target = style.cell or round(math.sqrt(PANEL_PIXELS / (len(labels) + 1) / len(snapshot.roles)))
        key = attention.grid, min(target, LARGEST_CELL)
        if key not in known:
            known[key] = Cells(photo, attention.grid, style, key[1], truth)
        cells = known[key]
        pictures = cells.draw(maps.numpy(), shown_masks(maps, style.threshold).numpy())
        flat = maps.flatten(-2)
        entropy, area = F.entropy(flat).tolist(), F.mask_area(flat, style.threshold).tolist()
        figures = zip(labels, entropy, area, flat.isfinite().all(-1).tolist(), strict=True)
        captions = [caption, *(_caption(*f) for f in figures)]
        model = f" {attention.model}" if attention.model else ""
        title = f"{role}{model} · layer {attention.layer} ({attention.name})"
        title += "" if attention.query in ("", "cls") else f" · {_QUERIES.get(attention.query, attention.query)}"
        title += " · mixed after the softmax" if attention.mixed else ""
        title += {"weights": " · weights that do not sum to 1", "signed": " · some weights are negative"}.get(
            attention.kind, ""
        )
        rows.append((title, list(zip(captions, [cells.photo, *pictures], strict=True))))
    header = f"{snapshot.names[image]} · step {snapshot.step:,} · epoch {snapshot.epoch}"
    return _compose(header, rows, style, truth is not None and bool(truth.any()))


def _mean_and_heads(maps: Tensor, heads: tuple[int, ...] | None) -> tuple[Tensor, list[str]]:
    """(1 + heads, gh, gw) and labels, from (H, gh, gw)."""
    shown = [h for h in heads or range(len(maps)) if h < len(maps)]
    return torch.cat([maps.mean(0, keepdim=True), maps[shown]]), ["mean", *(f"head {h}" for h in shown)]


def shown_masks(maps: Tensor, threshold: float) -> Tensor:
    """Mass masks of maps (..., gh, gw) as they are shown: empty where attention is practically uniform."""
    flat = maps.flatten(-2)
    masks = F.mass_mask(flat, threshold) & (F.entropy(flat) <= UNIFORM)[..., None]
    shown: Tensor = masks.unflatten(-1, maps.shape[-2:])
    return shown


def _caption(label: str, entropy: float, area: float, finite: bool) -> str:
    if not finite:
        return f"{label} · missing"
    if math.isnan(entropy):
        return label  # signed weights have neither entropy nor mask
    return f"{label} · H {entropy:.2f} · " + ("uniform" if entropy > UNIFORM else f"{area:.0%}")


def _has_layer(snapshot: AttentionSnapshot, role: str, layer: int) -> bool:
    captured = snapshot.layers_of(role)
    return layer in captured or (layer < 0 and -layer <= len(captured))


def columns_for(cells: int, roles: int, height: int, width: int) -> int:
    """Cells per line, so that the panel comes out near square, to be read on a card, with few empty places."""

    def cost(columns: int) -> float:
        lines = math.ceil(cells / columns)
        aspect = columns * (width + GAP) / (roles * (lines * (height + LINE + GAP) + LINE))
        return abs(math.log(aspect / 0.9)) + 1.2 * (lines * columns - cells) / cells

    return min(range(min(cells, 3), cells + 1), key=cost)


def _compose(header: str, rows: list[tuple[str, list[tuple[str, Pixels]]]], style: Style, truth: bool) -> Pixels:
    height, width = rows[0][1][0][1].shape[:2]
    most = max(len(cells) for _, cells in rows)
    columns = columns_for(most, len(rows), height, width)
    lines = [math.ceil(len(cells) / columns) for _, cells in rows]
    # Wide panels are shrunk more by a dashboard's card, so their text starts larger.
    line, large = (3 * GAP, 5) if width >= 20 * GAP else (LINE, 0)
    pitch_x, pitch_y = up_to_block(width) + GAP, up_to_block(height) + line + GAP
    title_height, header_height = line + GAP, HEADER + large
    size = max(columns * pitch_x + GAP, 53 * GAP), up_to_block(header_height) + LEGEND
    pictures = drawing.blank(size[0], size[1] + sum(title_height + n * pitch_y for n in lines))
    top, titles, captions = up_to_block(header_height), [], []
    for (title, cells), count in zip(rows, lines, strict=True):
        titles.append((top + 2, title))
        top += title_height
        for index, (caption, picture) in enumerate(cells):
            x, y = GAP + index % columns * pitch_x, top + index // columns * pitch_y
            drawing.paste(pictures, x, y, picture)
            captions.append(((x, y + height + 2), caption))
        top += count * pitch_y
    canvas = Image.fromarray(pictures)
    drawing.put(canvas, (GAP, 7), header, TEXT, 17 + large)
    for y, title in titles:
        drawing.write(canvas, (GAP, y), title, size[0] - 2 * GAP, 15 + large, MASK)
    for at, caption in captions:
        drawing.write(canvas, at, caption, width + GAP - 2, 13 + large)
    drawing.legend(canvas, top + 6, style, truth=truth, large=large)
    return np.asarray(canvas)


def filmstrip(
    history: Sequence[AttentionSnapshot],
    image: int,
    photo: Pixels,
    *,
    layer: int = -1,
    style: Style = Style(),
) -> Pixels:
    """One image's attention over time: a column for each step, thinned to ten, (height, width, 3).

    Rows are each role's head mean, then heads of the last role (the teacher): all up to four, else the four whose
    attention on this image is most concentrated at the end.
    """
    last = history[-1]
    chosen = [history[i] for i in thin([s.step for s in history], STRIP_COLUMNS)]
    main = last.roles[-1]
    attention = last.layer(main, layer)
    heads = list(style.heads or range(attention.rows.shape[1]))
    if len(heads) > STRIP_HEADS:
        entropies = F.entropy(attention.maps[image].flatten(-2)).nan_to_num(2.0)
        heads = sorted(sorted(heads, key=lambda h: float(entropies[h]))[:STRIP_HEADS])
    rows: list[tuple[str, int | None]] = [(role, None) for role in last.roles] + [(main, head) for head in heads]
    labels = [f"{role}\n{'mean' if head is None else f'head {head}'}" for role, head in rows]
    missing = torch.full(attention.grid, math.nan)
    maps = torch.stack([torch.stack([_map(s, r, layer, image, h, missing) for s in chosen]) for r, h in rows])
    cells = Cells(photo, attention.grid, style, STRIP_CELL)
    pictures = cells.draw(maps.numpy())  # (rows, steps, h, w, 3); too small for outlines
    title = f"{last.names[image]} · layer {attention.layer} · steps {chosen[0].step:,} to {last.step:,}"
    return _compose_strip(title, [s.step for s in chosen], labels, pictures, cells)


def timelapse(
    history: Sequence[AttentionSnapshot], photos: Sequence[Pixels], *, layer: int = -1, style: Style = Style()
) -> list[Pixels]:
    """One frame a step: the last role's head mean on every probe image, side by side."""
    last = history[-1]
    attention = last.layer(last.roles[-1], layer)
    missing = torch.full(attention.grid, math.nan)
    cells = [Cells(photo, attention.grid, style, TIMELAPSE_CELL) for photo in photos]
    height, width = cells[0].size
    columns = math.ceil(math.sqrt(len(cells)))
    pitch_x, pitch_y = width + GAP, height + GAP
    size = max(columns * pitch_x + GAP, 32 * GAP), HEADER + math.ceil(len(cells) / columns) * pitch_y
    frames = []
    for snapshot in history:
        pictures = drawing.blank(*size)
        title = f"{last.roles[-1]} · layer {attention.layer} · step {drawing.short(snapshot.step)}"
        for index, cell in enumerate(cells):
            shown = cell.draw(_map(snapshot, last.roles[-1], layer, index, None, missing).numpy())
            drawing.paste(pictures, GAP + index % columns * pitch_x, HEADER + index // columns * pitch_y, shown)
        canvas = Image.fromarray(pictures)
        drawing.put(canvas, (GAP, 7), title, TEXT, 17)
        frames.append(np.asarray(canvas))
    return frames


def _map(snapshot: AttentionSnapshot, role: str, layer: int, image: int, head: int | None, missing: Tensor) -> Tensor:
    """One map of the past; NaN where that step has none of the same grid."""
    if not _has_layer(snapshot, role, layer) or image >= len(snapshot.names):
        return missing
    maps = snapshot.maps(role, layer)[image]
    if maps.shape[1:] != missing.shape or (head is not None and head >= len(maps)):
        return missing
    return maps.mean(0) if head is None else maps[head]


def _compose_strip(title: str, steps: list[int], labels: list[str], pictures: Pixels, cells: Cells) -> Pixels:
    height, width = cells.size
    pitch_x, pitch_y = up_to_block(width) + GAP, up_to_block(height) + GAP
    margin = 13 * GAP
    left, top = margin + pitch_x, HEADER + 4 * GAP
    size = max(left + len(steps) * pitch_x, 58 * GAP), top + len(labels) * pitch_y + LEGEND
    canvas = drawing.blank(*size)
    drawing.paste(canvas, margin, top, cells.photo)
    for row, shown in enumerate(pictures):
        for column, picture in enumerate(shown):
            drawing.paste(canvas, left + column * pitch_x, top + row * pitch_y, picture)
    strip = Image.fromarray(canvas)
    drawing.put(strip, (GAP, 7), title, TEXT, 21)
    drawing.put(strip, (left - 2 * GAP, top - 23), "step", TEXT, 18, "r")
    for column, step in enumerate(steps):
        drawing.put(strip, (left + column * pitch_x + width / 2, top - 23), drawing.short(step), TEXT, 18, "m")
    for row, label in enumerate(labels):
        for line, text in enumerate(label.split("\n")):
            drawing.put(strip, (GAP, top + row * pitch_y + 8 + 22 * line), text, TEXT, 18)
    drawing.legend(strip, top + len(labels) * pitch_y + 6, cells.style, masks=False, large=3)
    return np.asarray(strip)
