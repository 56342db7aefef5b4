"""Describe which cell of the image each token holds, and the layout that follows from this assignment."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attn_monitor.grid import GridGeometry

STATIC, SEVERAL = -1, -2  # instead of a cell: the token does not depend on the image; it depends on several cells

Places = tuple[int, ...]
"""Token-to-patch assignment: the cell of each token, row by row from 0, or `STATIC`, or `SEVERAL`."""


@dataclass(frozen=True)
class TokenLayout:
    """Hold the token index of every patch of a grid, and of the prefix.

    Attributes:
        grid: Number of patches on each axis.
        prefix: Token indices of the prefix, CLS first, registers after it.
        patches: Token indices of the patches in row-major order.
        evidence: How the assignment was found. "exact": each token changes with its own cell and with no other.
            "exact but masked": likewise, with tokens between the others that a mask token replaced. "centres": fields
            overlap, and tokens are ordered by the centre of what they depend on.
        geometry: Where the cells lie in the image's pixels, None where they tile the whole image.
    """

    grid: tuple[int, ...]
    prefix: tuple[int, ...]
    patches: tuple[int, ...]
    evidence: str
    geometry: GridGeometry | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """Return the token indices of the prefix, then those of the patches, row by row."""
        return self.prefix + self.patches

    @property
    def places(self) -> Places:
        """Return the cell of each patch token, `STATIC` for the prefix."""
        cell_of_token = {token: cell for cell, token in enumerate(self.patches)}
        return tuple(cell_of_token.get(token, STATIC) for token in range(len(self.order)))


def is_whole(places: Places | None, cells: int) -> bool:
    """Check whether every cell is held by exactly one token."""
    return places is not None and sorted(p for p in places if p >= 0) == list(range(cells))


def mostly_single(places: Places) -> bool:
    """Check whether most tokens map to exactly one cell, and few to several, as a mean does.

    Where fields overlap, only some tokens lie inside a cell of a coarser grid, and the others depend on several.
    """
    return places.count(SEVERAL) <= min(8, max(sum(p >= 0 for p in places) - 1, 0))


def layout_of(
    places: Places, grid: tuple[int, ...], evidence: str, geometry: GridGeometry | None
) -> TokenLayout | None:
    """Derive the layout from an assignment.

    Args:
        places: The cell of each token.
        grid: Number of cells on each axis.
        evidence: How the assignment was found, as in `TokenLayout`.
        geometry: Where the cells lie in the image, None where they tile it.

    Returns:
        The layout, None where cells are missing or held twice. Some may be missing under mask tokens.
    """
    cells = math.prod(grid)
    if is_whole(places, cells) and mostly_single(places):
        token_of_cell = {place: token for token, place in enumerate(places) if place >= 0}
        prefix = tuple(token for token, place in enumerate(places) if place < 0)
        return TokenLayout(grid, prefix, tuple(token_of_cell[cell] for cell in range(cells)), evidence, geometry)
    # Where some patches show a mask token, the others must stand in row-major order behind the prefix.
    first, placed = len(places) - cells, [(t, p) for t, p in enumerate(places) if p >= 0]
    if first >= 0 and SEVERAL not in places and 2 * len(placed) > cells and all(t == first + p for t, p in placed):
        patches = tuple(range(first, len(places)))
        return TokenLayout(grid, tuple(range(first)), patches, f"{evidence} but masked", geometry)
    return None
