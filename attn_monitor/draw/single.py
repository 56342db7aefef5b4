"""Pictures of single maps without text, of the size of the model's input, for papers and other tools."""

from __future__ import annotations

import numpy as np
from PIL import Image

from attn_monitor.draw.canvas import BACKGROUND, MASK, MISSING, Array, Pixels, draw_outline
from attn_monitor.draw.cells import blend
from attn_monitor.draw.colormap import colour_table
from attn_monitor.draw.frame import Frame
from attn_monitor.draw.hatching import DIMMED, hatch, unseen_picture
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.scales import SCALES
from attn_monitor.grid import Grid


class PixelPictures:
    """Draw maps (gh, gw) of one image as pictures of the photograph's size; parts without a patch are dark and hatched.

    Args:
        photo: The image, uint8 (height, width, 3).
        grid: Patches of a map.
        options: Colours of the maps.
        hatched: Patches to hatch instead, bool (gh, gw).
    """

    def __init__(
        self,
        photo: Pixels,
        grid: tuple[int, ...],
        options: DrawingOptions,
        hatched: Array | None = None,
    ) -> None:
        self.photo, self.grid, self.options, self.hatched = photo, Grid(grid), options, hatched
        size = photo.shape[0], photo.shape[1]
        self._rows, self._cols = self.grid.cells_of_pixels(size)
        self._seen = Frame(self.grid, (1, 1), size).seen(size)
        self._unseen = (self._rows < 0)[:, None] | (self._cols < 0)

    def heat_map(self, weights: Array) -> Pixels:
        """Draw a map's colours alone, each patch as a rectangle."""
        if np.isfinite(weights).all():
            level = SCALES[self.options.scale].position(weights)
            cells = colour_table(self.options.colormap)[(level * 255).astype(np.uint8)]
        else:
            cells = np.full((*weights.shape, 3), MISSING, np.uint8)
        return self._finished(
            self._over_pixels(cells).astype(np.uint8), np.full(self._unseen.shape, BACKGROUND[0] / DIMMED)
        )

    def heat_map_over(self, weights: Array) -> Pixels:
        """Draw a map over the photograph in grey."""
        grey = np.asarray(Image.fromarray(self.photo).convert("L"), dtype=np.float32)
        if np.isfinite(weights).all():
            level = self._over_pixels(SCALES[self.options.scale].position(weights))
            picture = blend(level, grey, self.options.colormap)
        else:
            picture = np.full(self.photo.shape, MISSING, np.uint8)
        return self._finished(picture, grey)

    def masked(self, mask: Array) -> Pixels:
        """Draw the photograph, dark outside a mask, bool (gh, gw), and with its outline."""
        inside = self._over_pixels(mask) & ~self._unseen
        picture: Pixels = np.where(inside[..., None], self.photo, self.photo * DIMMED).astype(np.uint8)
        draw_outline(picture, inside, MASK, 1)
        return self._finished(picture, np.asarray(Image.fromarray(self.photo).convert("L"), dtype=np.float32))

    def _over_pixels(self, cells: Array) -> Array:
        return cells[self._rows[:, None], self._cols]

    def _finished(self, picture: Pixels, grey: Array) -> Pixels:
        if self._unseen.any():
            picture[self._unseen] = unseen_picture(grey, self._seen)[self._unseen]
        if self.hatched is not None:
            hatch(picture, self._over_pixels(self.hatched) & ~self._unseen, picture.shape[0] // self.grid[0])
        return picture
