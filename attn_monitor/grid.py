"""`Grid`: how many cells a map has along each axis, and where they lie in the image's own pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class GridGeometry:
    """Origin of the first cell and size of a cell on each axis (rows, then columns), in pixels of the image.

    Cell i of an axis sees the pixels from origin + i · cell to origin + (i + 1) · cell, as far as the image has them:
    a model that pads begins before the image or ends behind it, and one that drops a remainder or crops leaves pixels
    that no cell sees.
    """

    origin: tuple[float, ...]
    cell: tuple[float, ...]

    def __str__(self) -> str:
        cell, origin = (" × ".join(f"{x:.4g}" for x in self.cell), ", ".join(f"{x:.4g}" for x in self.origin))
        return f"{cell} pixels each from ({origin}) on"

    def unless_whole(self, grid: Sequence[int], size: Sequence[int]) -> GridGeometry | None:
        """This geometry, or None where its cells tile an image of this size."""
        ends = zip(self.origin, self.cell, grid, size, strict=True)
        tiles = all(abs(o) < 1e-3 and abs(o + c * g - n) < 1e-3 for o, c, g, n in ends)
        return None if tiles else self


class Grid(tuple[int, ...]):
    """Number of cells along each axis (rows, columns), and where the cells lie in the image's own pixels.

    It is the tuple of these numbers, and equal to it: ``rows, columns = grid``. ``geometry`` is None where the cells
    tile the whole image. ``size`` below is the image's, in pixels along each axis.

    Example:
        >>> grid = Grid((4, 6))
        >>> grid == (4, 6), grid.cells, grid.centres((32, 48))[0]
        (True, 24, [4.0, 12.0, 20.0, 28.0])
    """

    geometry: GridGeometry | None

    def __new__(cls, shape: Iterable[int], geometry: GridGeometry | None = None) -> Grid:
        """``shape`` may be a grid, and then keeps its geometry where none is given."""
        grid = super().__new__(cls, shape)
        grid.geometry = geometry or getattr(shape, "geometry", None)
        return grid

    def __getnewargs__(self) -> tuple[tuple[int, ...], GridGeometry | None]:
        return tuple(self), self.geometry

    def __str__(self) -> str:
        return " × ".join(map(str, self))

    @property
    def cells(self) -> int:
        """Number of all cells."""
        return math.prod(self)

    def unflatten(self, values: Tensor) -> Tensor:
        """(..., cells) to (..., *grid)."""
        unflattened: Tensor = values.unflatten(-1, tuple(self))
        return unflattened

    def placed(self, size: Sequence[int]) -> GridGeometry:
        """The geometry, or that of cells which tile an image of this size where there is none."""
        whole = tuple(pixels / cells for pixels, cells in zip(size, self, strict=True))
        return self.geometry or GridGeometry((0.0,) * len(self), whole)

    def borders(self, size: Sequence[int]) -> list[list[float]]:
        """On each axis the borders of the cells in pixels, one more than cells, none outside of the image."""
        axes = zip(self.placed(size).origin, self.placed(size).cell, self, size, strict=True)
        return [[min(max(o + i * c, 0.0), float(n)) for i in range(g + 1)] for o, c, g, n in axes]

    def centres(self, size: Sequence[int]) -> list[list[float]]:
        """On each axis the middle of what each cell sees of the image, in pixels."""
        return [[(a + b) / 2 for a, b in itertools.pairwise(x)] for x in self.borders(size)]

    def cells_of_pixels(self, size: Sequence[int]) -> list[Indices]:
        """On each axis the cell that each pixel is in, -1 where no cell sees it."""
        found = []
        for o, c, g, n in zip(self.placed(size).origin, self.placed(size).cell, self, size, strict=True):
            cell = np.floor((np.arange(n) - o) / c + 1e-6).astype(np.int64)
            found.append(np.where((cell >= 0) & (cell < g), cell, -1))
        return found

    def seen_share(self, size: Sequence[int]) -> float:
        """Share of the image that cells see, 0…1."""
        shares = [(x[-1] - x[0]) / n for x, n in zip(self.borders(size), size, strict=True)]
        return float(np.prod(shares))

    def over_pixels(self, cells: Tensor, size: tuple[int, int]) -> Tensor:
        """Values of cells (..., gh, gw) at each pixel of an image, (..., H, W); 0 where no cell is."""
        rows, cols = (torch.from_numpy(i).to(cells.device) for i in self.cells_of_pixels(size))
        return cells[..., rows[:, None], cols].where((rows >= 0)[:, None] & (cols >= 0), 0)
