"""`Grid`: how many cells a map has along each axis, of which there may be any number, and where they lie in the image.

Axes have names: h and w for rows and columns of a picture, t for frames or time, d for slices of a volume, f for
frequency. An image's *size* is its number of pixels (frames, slices, samples) along each axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class GridGeometry:
    """Origin of the first cell and size of a cell on each axis, in pixels of the image.

    Cell i of an axis sees the pixels from origin + i · cell to origin + (i + 1) · cell, as far as the image has them:
    a model that pads begins before the image or ends behind it, and one that drops a remainder or crops leaves pixels
    that no cell sees. Where patches overlap, cells are their middles, and ``margin`` is how far on each axis the
    outermost patches see beyond their cells; it is empty where patches do not overlap.
    """

    origin: tuple[float, ...]
    cell: tuple[float, ...]
    margin: tuple[float, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        cell, origin = (" × ".join(f"{x:.4g}" for x in self.cell), ", ".join(f"{x:.4g}" for x in self.origin))
        return f"{cell} pixels each from ({origin}) on"

    def unless_whole(self, grid: Sequence[int], size: Sequence[int]) -> GridGeometry | None:
        """This geometry, or None where its cells tile an image of this size."""
        ends = zip(self.origin, self.cell, grid, size, strict=True)
        tiles = all(abs(o) < 1e-3 and abs(o + c * g - n) < 1e-3 for o, c, g, n in ends)
        return None if tiles else self


AXES = {1: ("t",), 2: ("h", "w"), 3: ("t", "h", "w")}
"""Names of the axes of a grid where none are given, by their number."""


class Grid(tuple[int, ...]):
    """Number of cells along each axis, the names of the axes, and where the cells lie in the image's own pixels.

    It is the tuple of these numbers, and equal to it: ``rows, columns = grid``. ``geometry`` is None where the cells
    tile the whole image. ``size`` below is the image's, in pixels along each axis.

    Example:
        >>> grid = Grid((4, 6))
        >>> grid == (4, 6), grid.cells, grid.centres((32, 48))[0]
        (True, 24, [4.0, 12.0, 20.0, 28.0])
        >>> Grid((8, 14, 14)).axes
        ('t', 'h', 'w')
    """

    geometry: GridGeometry | None
    axes: tuple[str, ...]

    def __new__(
        cls, shape: Iterable[int], geometry: GridGeometry | None = None, axes: Sequence[str] | None = None
    ) -> Grid:
        """``shape`` may be a grid, and then keeps its geometry and the names of its axes where none are given."""
        grid = super().__new__(cls, shape)
        grid.geometry = geometry or getattr(shape, "geometry", None)
        known = axes or getattr(shape, "axes", None) or AXES.get(len(grid)) or (f"axis {n}" for n in range(len(grid)))
        grid.axes = tuple(known)
        return grid

    def __getnewargs__(self) -> tuple[tuple[int, ...], GridGeometry | None, tuple[str, ...]]:
        return tuple(self), self.geometry, self.axes

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

    @property
    def has_one_unit(self) -> bool:
        """Whether lengths along the axes may be added: rows and columns of a picture, or one axis alone."""
        return len(self) == 1 or self.axes == ("h", "w")

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

    def cell_of_pixels(self, size: Sequence[int]) -> Tensor:
        """The cell that each pixel is in, (*size), numbered as in `lines`; -1 where no cell sees it."""
        index, seen = torch.zeros((), dtype=torch.int64, device="cpu"), torch.ones((), dtype=torch.bool, device="cpu")
        for axis, (cells, count) in enumerate(zip(self.cells_of_pixels(size), self, strict=True)):
            line = torch.from_numpy(cells).view(-1, *(1 for _ in self[axis + 1 :]))
            index, seen = index * count + line, seen & (line >= 0)
        return torch.where(seen, index, -1)

    @property
    def lines(self) -> Tensor:
        """On each axis the line (row, column, slice) of each cell, (axes, cells); the last axis runs fastest."""
        return torch.stack(torch.unravel_index(torch.arange(self.cells, device="cpu"), tuple(self)))

    def seen(self, size: Sequence[int]) -> list[tuple[float, float]]:
        """First and last border on each axis of what patches see, in pixels, with the margin of overlapping ones."""
        margin = self.placed(size).margin or (0.0,) * len(self)
        axes = zip(self.placed(size).origin, self.placed(size).cell, self, margin, size, strict=True)
        return [(max(o - m, 0.0), min(o + c * g + m, float(n))) for o, c, g, m, n in axes]

    def seen_share(self, size: Sequence[int]) -> float:
        """Share of the image that patches see, 0…1."""
        return float(np.prod([(end - start) / n for (start, end), n in zip(self.seen(size), size, strict=True)]))

    def over_pixels(self, cells: Tensor, size: Sequence[int]) -> Tensor:
        """Values of cells (..., *grid) at each pixel of an image, (..., *size); 0 where no cell is."""
        index = self.cell_of_pixels(size).to(cells.device)
        return cells.flatten(-len(self))[..., index].where(index >= 0, 0)
