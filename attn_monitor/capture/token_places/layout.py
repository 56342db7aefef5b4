"""Places of tokens: the cell of the image that each one holds, and the layout that such places amount to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attn_monitor.grid import GridGeometry

STATIC, SEVERAL = -1, -2  # in place of a cell: holds nothing of the image; holds more than one cell

Places = tuple[int, ...]
"""The cell that each token holds, row by row from 0, or `STATIC`, or `SEVERAL`."""


@dataclass(frozen=True)
class TokenLayout:
    """Token indices of the prefix (CLS first, registers after it) and of the patches in row-major order.

    ``evidence`` says how the places are known: "exact", each token changes with its own cell and with no other; "exact
    but masked", likewise, and tokens that a mask token replaced stand between the others; "centres", fields overlap,
    and tokens are ordered by the centre of what they hold. ``geometry`` is where the cells lie in the image's pixels,
    None where they tile the whole image.
    """

    grid: tuple[int, int]
    prefix: tuple[int, ...]
    patches: tuple[int, ...]
    evidence: str
    geometry: GridGeometry | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """Token indices so that the prefix comes first and the patches follow, row by row."""
        return self.prefix + self.patches

    @property
    def places(self) -> Places:
        """The cell of each patch token, `STATIC` for the prefix."""
        cell_of_token = {token: cell for cell, token in enumerate(self.patches)}
        return tuple(cell_of_token.get(token, STATIC) for token in range(len(self.order)))


def is_whole(places: Places | None, cells: int) -> bool:
    """Whether every cell is held by exactly one token."""
    return places is not None and sorted(p for p in places if p >= 0) == list(range(cells))


def mostly_single(places: Places) -> bool:
    """Whether tokens of a part of their own are the rule, and those that hold several are few, such as a mean.

    Where fields overlap, some tokens lie inside a cell of a coarser grid than theirs, and the others between them.
    """
    return places.count(SEVERAL) <= min(8, max(sum(p >= 0 for p in places) - 1, 0))


def layout_of(
    places: Places, grid: tuple[int, int], evidence: str, geometry: GridGeometry | None
) -> TokenLayout | None:
    """The layout that places amount to, None where cells are missing or held twice."""
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
