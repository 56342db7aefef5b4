"""The time-lapse of all probe images, and GIFs of any sequence of pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from attn_monitor.draw.animation_files import GifAnimation
from attn_monitor.draw.canvas import GAP, HEADER, Pixels, blank_picture, draw_text, paste
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.maps import map_or_missing
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.strips import short_step
from attn_monitor.snapshot import Snapshot
from attn_monitor.workers import safe_point

TIMELAPSE_CELL = 128

Item = TypeVar("Item")


def timelapse(
    history: Sequence[Snapshot],
    photos: Sequence[Pixels],
    *,
    layer: int = -1,
    options: DrawingOptions = DrawingOptions(),
) -> list[Pixels]:
    """Draw the last role's head mean on every probe image side by side, one frame per snapshot.

    Args:
        history: Snapshots in order of steps.
        photos: The probe images, uint8 (H, W, 3) each.
        layer: Layer to draw; a negative one counts from the last.
        options: Colours of the maps.

    Returns:
        Frames, uint8 (height, width, 3), all of one size.
    """
    history = [snapshot.in_plane() for snapshot in history]
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
            safe_point()
            shown = painter.paint(map_or_missing(snapshot, role, layer, index, None, missing).numpy())
            paste(pictures, GAP + index % columns * pitch_x, HEADER + index // columns * pitch_y, shown)
        canvas = Image.fromarray(pictures)
        draw_text(canvas, (GAP, 7), f"{role} · layer {attention.layer} · step {short_step(snapshot.step)}", 17)
        frames.append(np.asarray(canvas))
    return frames


def gif(frames: Iterable[Pixels]) -> bytes:
    """Encode pictures of one size as an endless GIF that shows its last frame longer."""
    buffer = io.BytesIO()
    animation = GifAnimation(buffer)
    for frame, seconds in with_durations(frames):
        animation.add(frame, seconds)
    animation.close()
    return buffer.getvalue()


def with_durations(items: Iterable[Item], seconds: float = 0.4) -> Iterator[tuple[Item, float]]:
    """Pair each item with its duration in seconds; the last one is shown four times as long as the others."""
    shown: list[Item] = []
    for item in items:
        yield from ((before, seconds) for before in shown)
        shown = [item]
    yield from ((last, 4 * seconds) for last in shown)
