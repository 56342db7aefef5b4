"""`Frame`: where the patches of a grid are in a picture of the image, whose parts that no patch sees are hatched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attn_monitor.draw.canvas import Array
from attn_monitor.grid import Grid


@dataclass(frozen=True)
class Frame:
    """A picture of an image in which each patch of a grid is a square of ``patch`` pixels.

    ``size`` is the picture's height and width, ``at`` the row and column of the first patch's corner: negative where
    the model pads before the image.
    """

    grid: Grid
    patch: int
    size: tuple[int, int]
    at: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, grid: tuple[int, ...], side: int, image: tuple[int, int] = (0, 0)) -> Frame:
        """With a longer side near ``side`` and patches of 2ⁿ pixels; ``image`` is the size of the model's image."""
        grid = Grid(grid)
        geometry = grid.geometry
        if geometry is None:
            patch = _patch(side, grid)
            return cls(grid, patch, (grid[0] * patch, grid[1] * patch))
        cells = [n / c for n, c in zip(image, geometry.cell, strict=True)]  # of the picture, as it is whole cells
        patch = _patch(side, cells)
        height, width = (max(1, round(n * patch)) for n in cells)
        row, col = (round(o / c * patch) for o, c in zip(geometry.origin, geometry.cell, strict=True))
        return cls(grid, patch, (height, width), (row, col))

    @property
    def is_whole(self) -> bool:
        """Whether the patches tile the picture."""
        return (self.at, self.size) == ((0, 0), self._extent)

    @property
    def unseen(self) -> Array:
        """The pixels of the picture in which no patch is, bool (h, w)."""
        unseen = np.ones(self.size, dtype=bool)
        unseen[self._inside] = False
        return unseen

    def enlarge(self, cells: Array) -> Array:
        """Repeat each patch of (..., gh, gw, channels) over its place, (..., h, w, channels); 0 where no patch is."""
        return self.put(cells.repeat(self.patch, -3).repeat(self.patch, -2), np.zeros((), cells.dtype))

    def put(self, patches: Array, below: Array) -> Array:
        """Patches that are enlarged, (..., gh · patch, gw · patch, channels), in their place on a picture (h, w, …)."""
        if self.is_whole:
            return patches
        picture = np.empty((*patches.shape[:-3], *self.size, patches.shape[-1]), patches.dtype)
        picture[...] = below
        (top, bottom, left, right), (rows, cols) = self._edges, self._inside
        picture[..., rows, cols, :] = patches[..., top:bottom, left:right, :]
        return picture

    def cut(self, picture: Array) -> Array:
        """What of a picture (h, w) lies below the patches, (gh · patch, gw · patch); 0 where they lie outside of it."""
        if self.is_whole:
            return picture
        below = np.zeros(self._extent, picture.dtype)
        top, bottom, left, right = self._edges
        below[top:bottom, left:right] = picture[self._inside]
        return below

    @property
    def _extent(self) -> tuple[int, int]:
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def _inside(self) -> tuple[slice, slice]:
        """Where patches are in the picture."""
        bounds = zip(self.at, self._extent, self.size, strict=True)
        rows, cols = (slice(max(at, 0), min(at + extent, size)) for at, extent, size in bounds)
        return rows, cols

    @property
    def _edges(self) -> tuple[int, int, int, int]:
        """What of the enlarged patches is in the picture."""
        (rows, cols), (row, col) = self._inside, self.at
        return rows.start - row, rows.stop - row, cols.start - col, cols.stop - col


def _patch(side: int, cells: tuple[float, ...] | list[float]) -> int:
    return int(2 ** max(0, round(math.log2(side / max(cells)))))
