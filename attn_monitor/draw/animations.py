"""Animations: the time-lapse of all probe images, and the GIF of any sequence of pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image

from attn_monitor.draw.canvas import GAP, HEADER, Pixels, blank_picture, draw_text, paste
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.maps import past_map
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.strips import short_step
from attn_monitor.record.snapshot import AttentionSnapshot

TIMELAPSE_CELL = 128


def timelapse(
    history: Sequence[AttentionSnapshot],
    photos: Sequence[Pixels],
    *,
    layer: int = -1,
    options: DrawingOptions = DrawingOptions(),
) -> list[Pixels]:
    """One frame a step: the last role's head mean on every probe image, side by side."""
    last = history[-1]
    role = last.roles[-1]
    attention = last.layer(role, layer)
    missing = torch.full(attention.grid, math.nan)
    painters = [CellPainter(photo, attention.grid, options, TIMELAPSE_CELL) for photo in photos]
    height, width = painters[0].size
    columns = math.ceil(math.sqrt(len(painters)))
    pitch_x, pitch_y = width + GAP, height + GAP
    size = max(columns * pitch_x + GAP, 32 * GAP), HEADER + math.ceil(len(painters) / columns) * pitch_y
    frames = []
    for snapshot in history:
        pictures = blank_picture(*size)
        for index, painter in enumerate(painters):
            shown = painter.paint(past_map(snapshot, role, layer, index, None, missing).numpy())
            paste(pictures, GAP + index % columns * pitch_x, HEADER + index // columns * pitch_y, shown)
        canvas = Image.fromarray(pictures)
        draw_text(canvas, (GAP, 7), f"{role} · layer {attention.layer} · step {short_step(snapshot.step)}", 17)
        frames.append(np.asarray(canvas))
    return frames


def gif(frames: Iterable[Pixels], seconds: float = 0.4) -> bytes:
    """An endless animation of pictures of one size, holding its last frame longer."""
    images = [Image.fromarray(f).quantize(128) for f in frames]
    durations = [int(seconds * 1000)] * (len(images) - 1) + [int(seconds * 4000)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return buffer.getvalue()
