"""Frames of a video: a photograph, and over it the head mean and every head of a model's attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from attn_monitor.attention import LayerAttention
from attn_monitor.draw.canvas import GAP, LINE, MASK, Array, Pixels, blank_picture, draw_text_within, paste, up_to_block
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.frame import Frame
from attn_monitor.draw.legend import LEGEND, draw_legend
from attn_monitor.draw.maps import map_statistics, mean_and_heads
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.panels import columns_for, layer_title
from attn_monitor.draw.scales import GREY
from attn_monitor.errors import ArgumentError
from attn_monitor.grid import Grid

FRAME_PIXELS, LARGEST_CELL = 800_000, 640  # pixels of all cells together, largest side of one
ASPECT = 16 / 9
OUTSIDE = ("attention", "photo", "black")
"""Choices of what is shown outside the mass mask."""


class FrameDrawing:
    """Draw the frames of one video, all in one layout.

    Args:
        options: Colours, heads and size of the maps.
        outside: What is shown outside the mass mask: "attention" as inside it, "photo" (the photograph in grey), or
            "black". The mask is outlined in each case; maps without one (uniform or missing) are shown as a whole.
    """

    def __init__(self, options: DrawingOptions = DrawingOptions(), outside: str = "attention") -> None:
        if outside not in OUTSIDE:
            raise ArgumentError(f"outside={outside!r}: expected one of {', '.join(OUTSIDE)}")
        self.options, self.outside = options, outside
        self._layout: _Layout | None = None

    def draw(self, photo: Pixels, layers: Sequence[LayerAttention], image: int) -> Pixels:
        """Draw a frame, uint8 (height, width, 3).

        Args:
            photo: The image, uint8 (H, W, 3).
            layers: Attention of each layer on a batch.
            image: Index of the image in the batch.
        """
        layout = self._layout = self._layout or _lay_out(layers, self.options, (photo.shape[0], photo.shape[1]))
        frame: Pixels = layout.background.copy()
        painters: dict[tuple[object, ...], CellPainter] = {}  # mostly shared by layers
        for attention, places in zip(layers, layout.places, strict=True):
            key = attention.grid, attention.geometry
            if key not in painters:
                painters[key] = CellPainter(photo, attention.grid, self.options, layout.side)
            painter = painters[key]
            maps, _ = mean_and_heads(attention.maps[image].cpu(), self.options.drawn_heads)
            masks = map_statistics(maps, self.options.threshold).mask.numpy()
            pictures = painter.paint(maps.numpy(), masks)
            unmasked = ~masks.any((-2, -1), keepdims=True)  # uniform or missing
            self._hide(pictures, masks | unmasked, painter)
            for (x, y), picture in zip(places, [painter.photo, *pictures], strict=True):
                paste(frame, x, y, picture)
        return frame

    def _hide(self, pictures: Pixels, shown: Array, painter: CellPainter) -> None:
        """Cover all patches but those shown, bool (..., gh, gw), in place."""
        if self.outside == "attention":
            return
        below = np.zeros(painter.size) if self.outside == "black" else GREY * painter.grey
        hidden = painter.frame.enlarge(~shown[..., None])
        np.copyto(pictures, below.astype(np.uint8)[..., None], where=hidden)


@dataclass(frozen=True)
class _Layout:
    """Parts common to all frames: the background with titles, captions and legend, and each layer's places of cells."""

    background: Pixels
    side: int
    places: list[list[tuple[int, int]]]


def _lay_out(layers: Sequence[LayerAttention], options: DrawingOptions, image: tuple[int, int]) -> _Layout:
    labels = [["original", *mean_and_heads(a.maps[0], options.drawn_heads)[1]] for a in layers]
    side = options.cell or _side(sum(map(len, labels)), layers[0].grid)
    sizes = [Frame.of(attention.grid, side, image).size for attention in layers]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    columns = columns_for(max(map(len, labels)), len(layers), height, width, ASPECT)
    pitch_x, pitch_y = up_to_block(width) + GAP, up_to_block(height) + LINE + GAP
    titles, captions, places, top = [], [], [], GAP
    for attention, shown in zip(layers, labels, strict=True):
        titles.append(((GAP, top), layer_title(attention, unseen=1 - attention.grid.seen_share(image))))
        top += LINE + GAP
        cells = [(GAP + i % columns * pitch_x, top + i // columns * pitch_y) for i in range(len(shown))]
        captions += [((x, y + height + 1), label) for (x, y), label in zip(cells, shown, strict=True)]
        places.append(cells)
        top += math.ceil(len(shown) / columns) * pitch_y
    canvas = Image.fromarray(blank_picture(max(GAP + columns * pitch_x, 53 * GAP), top + LEGEND))
    for at, title in titles:
        draw_text_within(canvas, at, title, canvas.width - 2 * GAP, 15, MASK)
    for at, caption in captions:
        draw_text_within(canvas, at, caption, width, 13)
    draw_legend(canvas, top + 6, options, areas=False)
    return _Layout(np.asarray(canvas), side, places)


def _side(cells: int, grid: Grid) -> int:
    """Choose the longer side of a cell so that all cells together have about `FRAME_PIXELS`."""
    patch = math.sqrt(FRAME_PIXELS / cells / math.prod(grid))
    return min(round(patch * max(grid)), LARGEST_CELL)
