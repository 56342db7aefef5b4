"""`Frame`: the places of a grid's patches in a picture of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attn_monitor.draw.canvas import Array
from attn_monitor.grid import Grid


@dataclass(frozen=True)
class Frame:
    """Layout of a picture of an image in which each patch of a grid has whole pixels.

    Args:
        grid: The patches.
        patch: Height and width of a patch in pixels of the picture.
        size: Height and width of the picture.
        at: Row and column of the first patch's corner; negative where the model pads before the image.
    """

    grid: Grid
    patch: tuple[int, int]
    size: tuple[int, int]
    at: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, grid: tuple[int, ...], side: int, image: tuple[int, int] = (0, 0)) -> Frame:
        """Choose patches of 2ⁿ by 2ᵐ pixels so that the longer side is about ``side``, and patches have their shape.

        Args:
            grid: The patches.
            side: Wanted longer side in pixels.
            image: Height and width of the model's image; patches are taken for squares without it.
        """
        grid = Grid(grid)
        geometry = grid.geometry
        cells = (
            [float(n) for n in grid] if geometry is None else [n / c for n, c in zip(image, geometry.cell, strict=True)]
        )
        known = "" not in grid.axes and 0 not in image
        patch = _patch(side, cells, image[0] / cells[0] * cells[1] / image[1] if known else 1.0)
        if geometry is None:
            return cls(grid, patch, (grid[0] * patch[0], grid[1] * patch[1]))
        height, width = (max(1, round(n * p)) for n, p in zip(cells, patch, strict=True))
        row, col = (round(o / c * p) for o, c, p in zip(geometry.origin, geometry.cell, patch, strict=True))
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
        return self.put(cells.repeat(self.patch[0], -3).repeat(self.patch[1], -2), np.zeros((), cells.dtype))

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
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

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


def long_side(side: int, photo: Array, longest: int) -> int:
    """Return ``side``; of images longer than two squares that of a picture with a square's area, up to ``longest``."""
    ratio = max(photo.shape[:2]) / min(photo.shape[:2])
    return max(side, min(round(side * math.sqrt(ratio)), longest)) if ratio > 2 else side


def _patch(side: int, cells: Sequence[float], ratio: float) -> tuple[int, int]:
    """Return the height and width of a patch, powers of two with about ``ratio`` between them."""
    power = round(math.log2(ratio))
    down, right = 2 ** max(power, 0), 2 ** max(-power, 0)
    unit = int(2 ** max(0, round(math.log2(side / max(cells[0] * down, cells[1] * right)))))
    return unit * down, unit * right
