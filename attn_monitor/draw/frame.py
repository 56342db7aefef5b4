"""`Frame`: the places of a grid's patches in a picture of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attn_monitor.draw.canvas import Array
from attn_monitor.grid import Grid


@dataclass(frozen=True)
class Frame:
    """Layout of a picture of an image in which each patch of a grid is a square.

    Args:
        grid: The patches.
        patch: Side of a patch in pixels of the picture.
        size: Height and width of the picture.
        at: Row and column of the first patch's corner; negative where the model pads before the image.
    """

    grid: Grid
    patch: int
    size: tuple[int, int]
    at: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, grid: tuple[int, ...], side: int, image: tuple[int, int] = (0, 0)) -> Frame:
        """Choose patches of 2ⁿ pixels so that the longer side is about ``side``.

        Args:
            grid: The patches.
            side: Wanted longer side in pixels.
            image: Height and width of the model's image, needed if patches do not tile it.
        """
        grid = Grid(grid)
        geometry = grid.geometry
        if geometry is None:
            patch = _patch(side, grid)
            return cls(grid, patch, (grid[0] * patch, grid[1] * patch))
        cells = [n / c for n, c in zip(image, geometry.cell, strict=True)]  # size of the picture in cells
        patch = _patch(side, cells)
        height, width = (max(1, round(n * patch)) for n in cells)
        row, col = (round(o / c * patch) for o, c in zip(geometry.origin, geometry.cell, strict=True))
        return cls(grid, patch, (height, width), (row, col))

    @property
    def is_whole(self) -> bool:
        """True if the patches tile the picture."""
        return (self.at, self.size) == ((0, 0), self._extent)

    def seen(self, image: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of the picture that patches see, with the margin of overlapping ones beyond their cells.

        Args:
            image: Height and width of the model's image.
        """
        ends = zip(self.grid.seen(image), self.size, image, strict=True)
        rows, cols = (slice(round(a * s / n), round(b * s / n)) for (a, b), s, n in ends)
        return rows, cols

    def enlarge(self, cells: Array) -> Array:
        """Enlarge patches (..., gh, gw, channels) to the picture, (..., h, w, channels); 0 where no patch is."""
        return self.put(cells.repeat(self.patch, -3).repeat(self.patch, -2), np.zeros((), cells.dtype))

    def put(self, patches: Array, below: Array) -> Array:
        """Place enlarged patches, (..., gh · patch, gw · patch, channels), on a picture (h, w, ...)."""
        if self.is_whole:
            return patches
        picture = np.empty((*patches.shape[:-3], *self.size, patches.shape[-1]), patches.dtype)
        picture[...] = below
        (top, bottom, left, right), (rows, cols) = self._edges, self._inside
        picture[..., rows, cols, :] = patches[..., top:bottom, left:right, :]
        return picture

    def cut(self, picture: Array) -> Array:
        """Cut out the part of a picture (h, w) below the patches, (gh · patch, gw · patch); 0 outside the picture."""
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
        """Rows and columns of the picture that patches cover."""
        bounds = zip(self.at, self._extent, self.size, strict=True)
        rows, cols = (slice(max(at, 0), min(at + extent, size)) for at, extent, size in bounds)
        return rows, cols

    @property
    def _edges(self) -> tuple[int, int, int, int]:
        """Top, bottom, left and right of the enlarged patches' part within the picture."""
        (rows, cols), (row, col) = self._inside, self.at
        return rows.start - row, rows.stop - row, cols.start - col, cols.stop - col


def _patch(side: int, cells: tuple[float, ...] | list[float]) -> int:
    return int(2 ** max(0, round(math.log2(side / max(cells)))))
