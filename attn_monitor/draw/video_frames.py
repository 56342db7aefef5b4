"""Frames of a video: a photograph, and over it the mean and every head of what a model attends to in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from attn_monitor.attention import LayerAttention
from attn_monitor.draw.canvas import GAP, LINE, MASK, Array, Pixels, blank_picture, draw_text_within, paste, up_to_block
from attn_monitor.draw.cells import CellPainter, enlarge
from attn_monitor.draw.legend import LEGEND, draw_legend
from attn_monitor.draw.maps import map_statistics, mean_and_heads
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.panels import columns_for, layer_title

FRAME_PIXELS, LARGEST_CELL = 800_000, 640  # of all cells together, and the side of one
ASPECT = 16 / 9
OUTSIDE = ("attention", "photo", "black")
"""What is shown outside the mass mask."""


@dataclass
class FrameDrawing:
    """Draws the frames of one video, which are all laid out alike.

    ``outside`` says what is shown outside the mass mask: "attention" as inside it, "photo" the photograph in grey, or
    "black". The mask is outlined in each case.
    """

    options: DrawingOptions = DrawingOptions()
    outside: str = "attention"
    _background: Pixels | None = field(default=None, init=False)
    _side: int = field(default=0, init=False)
    _places: list[list[tuple[int, int]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.outside not in OUTSIDE:
            raise ValueError(f"outside={self.outside!r}: expected one of {', '.join(OUTSIDE)}")

    def draw(self, photo: Pixels, layers: Sequence[LayerAttention], image: int) -> Pixels:
        """A frame, uint8 (height, width, 3), of the attention of each layer on one image of a batch, and its photo."""
        if self._background is None:
            self._lay_out(layers)
        assert self._background is not None
        frame: Pixels = self._background.copy()
        painters: dict[tuple[int, int], CellPainter] = {}  # layers mostly share one
        for attention, places in zip(layers, self._places, strict=True):
            if attention.grid not in painters:
                painters[attention.grid] = CellPainter(photo, attention.grid, self.options, self._side)
            painter = painters[attention.grid]
            maps, _ = mean_and_heads(attention.maps[image].cpu(), self.options.heads)
            masks = map_statistics(maps, self.options.threshold).mask.numpy()
            pictures = painter.paint(maps.numpy(), masks)
            self._hide(pictures, masks, painter)
            for (x, y), picture in zip(places, [painter.photo, *pictures], strict=True):
                paste(frame, x, y, picture)
        return frame

    def _hide(self, pictures: Pixels, masks: Array, painter: CellPainter) -> None:
        """Cover what is outside the masks, in place."""
        if self.outside == "attention":
            return
        below = np.zeros(painter.size) if self.outside == "black" else 0.62 * painter.grey
        hidden = ~enlarge(masks[..., None], painter.size)
        np.copyto(pictures, below.astype(np.uint8)[..., None], where=hidden)

    def _lay_out(self, layers: Sequence[LayerAttention]) -> None:
        """All that is the same in every frame: where cells are, titles, captions and the legend."""
        labels = [["original", *mean_and_heads(a.maps[0], self.options.heads)[1]] for a in layers]
        self._side = self.options.cell or _side(sum(map(len, labels)), layers[0].grid)
        sizes = [CellPainter(np.zeros((8, 8, 3), np.uint8), a.grid, self.options, self._side).size for a in layers]
        height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
        columns = columns_for(max(map(len, labels)), len(layers), height, width, ASPECT)
        pitch_x, pitch_y = up_to_block(width) + GAP, up_to_block(height) + LINE + GAP
        texts: list[tuple[tuple[int, int], str, bool]] = []
        top = GAP
        for attention, shown in zip(layers, labels, strict=True):
            texts.append(((GAP, top), layer_title(attention), True))
            top += LINE + GAP
            places = [(GAP + i % columns * pitch_x, top + i // columns * pitch_y) for i in range(len(shown))]
            texts += [((x, y + height + 1), label, False) for (x, y), label in zip(places, shown, strict=True)]
            self._places.append(places)
            top += math.ceil(len(shown) / columns) * pitch_y
        canvas = Image.fromarray(blank_picture(max(GAP + columns * pitch_x, 53 * GAP), top + LEGEND))
        for at, text, is_title in texts:
            room = (canvas.width if is_title else width + GAP) - GAP
            draw_text_within(canvas, at, text, room, 15 if is_title else 13, *([MASK] if is_title else []))
        draw_legend(canvas, top + 6, self.options, areas=False)
        self._background = np.asarray(canvas)


def _side(cells: int, grid: tuple[int, int]) -> int:
    """The longer side of a cell, so that all of them together have about `FRAME_PIXELS`."""
    patch = math.sqrt(FRAME_PIXELS / cells / math.prod(grid))
    return min(round(patch * max(grid)), LARGEST_CELL)
