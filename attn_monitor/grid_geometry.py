"""`GridGeometry`: where the cells of a grid lie in the image's own pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class GridGeometry:
    """Where the first cell begins on each axis (rows, then columns), and the size of a cell, in pixels of the image.

    Cell i of an axis sees the pixels from origin + i · cell to origin + (i + 1) · cell, as far as the image has them:
    a model that pads begins before the image or ends behind it, and one that drops a remainder or crops leaves pixels
    that no cell sees.
    """

    origin: tuple[float, ...]
    cell: tuple[float, ...]

    def __str__(self) -> str:
        cell, origin = (" × ".join(f"{x:.4g}" for x in self.cell), ", ".join(f"{x:.4g}" for x in self.origin))
        return f"{cell} pixels each from ({origin}) on"

    @classmethod
    def whole(cls, grid: Sequence[int], size: Sequence[int]) -> GridGeometry:
        """Cells that tile an image of this size."""
        return cls((0.0,) * len(grid), tuple(pixels / cells for pixels, cells in zip(size, grid, strict=True)))

    def unless_whole(self, grid: Sequence[int], size: Sequence[int]) -> GridGeometry | None:
        """This geometry, or None where it tiles an image of this size: what None stands for wherever one is kept."""
        ends = zip(self.origin, self.cell, grid, size, strict=True)
        tiles = all(abs(o) < 1e-3 and abs(o + c * g - n) < 1e-3 for o, c, g, n in ends)
        return None if tiles else self

    def borders(self, grid: Sequence[int], size: Sequence[int]) -> list[list[float]]:
        """On each axis the borders of its cells in pixels, one more than cells, none outside of the image."""
        axes = zip(self.origin, self.cell, grid, size, strict=True)
        return [[min(max(o + i * c, 0.0), float(n)) for i in range(g + 1)] for o, c, g, n in axes]

    def centres(self, grid: Sequence[int], size: Sequence[int]) -> list[list[float]]:
        """On each axis the middle of what each cell sees of the image, in pixels."""
        return [[(a + b) / 2 for a, b in itertools.pairwise(x)] for x in self.borders(grid, size)]

    def cells_of_pixels(self, grid: Sequence[int], size: Sequence[int]) -> list[Indices]:
        """On each axis the cell that each pixel is in, -1 where no cell sees it."""
        found = []
        for o, c, g, n in zip(self.origin, self.cell, grid, size, strict=True):
            cell = np.floor((np.arange(n) - o) / c + 1e-6).astype(np.int64)
            found.append(np.where((cell >= 0) & (cell < g), cell, -1))
        return found

    def seen_share(self, grid: Sequence[int], size: Sequence[int]) -> float:
        """Share of the image that cells see, 0…1."""
        shares = [(x[-1] - x[0]) / n for x, n in zip(self.borders(grid, size), size, strict=True)]
        return float(np.prod(shares))


def placed(geometry: GridGeometry | None, grid: Sequence[int], size: Sequence[int]) -> GridGeometry:
    """A geometry, or that of a grid which tiles an image of this size where there is none."""
    return geometry or GridGeometry.whole(grid, size)
