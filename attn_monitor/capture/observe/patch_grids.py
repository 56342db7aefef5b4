"""List the patch grids that tokens could form: those of convolutions on pixels, and others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.grid import Grid, GridGeometry

_MERGES = (2, 4, 8, 16)  # patches per side in a coarser token of a pyramid


@dataclass(frozen=True)
class PatchConv:
    """Describe a patch grid, such as a convolution's output, and the pixels of its cells.

    Attributes:
        grid: (rows, columns).
        geometry: Origin and size of the cells, in pixels of the image, or of the ``seen`` input if that is given.
        disjoint: Whether the stride equals the kernel, so that every cell sees its own pixels only.
        seen: (height, width) of the convolution's input if it is not the unchanged image, else None.
        mirrored: Whether the convolution's cells run backwards along each axis of the image.
    """

    grid: tuple[int, int]
    geometry: GridGeometry
    disjoint: bool
    seen: tuple[int, int] | None = None
    mirrored: tuple[bool, bool] = (False, False)

    @property
    def placed_grid(self) -> Grid:
        """Return the grid together with its geometry."""
        return Grid(self.grid, self.geometry)

    def has_remainder(self, size: tuple[int, int]) -> bool:
        """Return whether no cell covers some pixels of an image of this size (height, width)."""
        return any(bool((cells < 0).any()) for cells in self.placed_grid.cells_of_pixels(size))

    def cell_of_pixels(self, size: tuple[int, int]) -> Tensor:
        """Return the cell index of each pixel, (H, W), or -1 where no cell covers it."""
        rows, cols = map(torch.from_numpy, self.placed_grid.cells_of_pixels(size))
        inside = (rows >= 0)[:, None] & (cols >= 0)
        return torch.where(inside, rows[:, None] * self.grid[1] + cols, -1)


def candidate_grids(
    image_size: tuple[int, int], tokens: int, moving: int, convs: Sequence[PatchConv]
) -> Iterator[PatchConv]:
    """Yield the grids that tokens could form, those of convolutions on pixels first.

    Args:
        image_size: (height, width) in pixels.
        tokens: Number of tokens.
        moving: Number of tokens that depend on the image.
        convs: The convolutions that ran on the images.
    """
    height, width = image_size
    whole = [c for c in convs if c.disjoint]
    yield from (c for c in whole if math.prod(c.grid) == moving)
    # A mask token does not depend on the image, but stands for a patch.
    yield from (c for c in whole if moving < math.prod(c.grid) <= tokens)
    # A token computed from all patches, such as their mean, depends on the image too.
    yield from (c for c in whole if moving - 8 <= math.prod(c.grid) < moving)
    if moving < 1 or any(math.prod(c.grid) == moving for c in whole):
        return
    yield from (c for c in _merged(whole, image_size) if math.prod(c.grid) == moving)
    overlapping = [c.grid for c in convs if c not in whole and math.prod(c.grid) == moving]
    rows = [r for r in range(1, moving + 1) if moving % r == 0]
    gh = min(rows, key=lambda r: abs(math.log((r * r / moving) * (width / height))))
    for grid in dict.fromkeys([*overlapping, (gh, moving // gh)]):
        yield PatchConv(grid, Grid(grid).placed(image_size), disjoint=False)


def _merged(convs: Sequence[PatchConv], size: tuple[int, int]) -> Iterator[PatchConv]:
    """Yield coarser grids that merge several patches per side into one token and do not tile the image."""
    for conv in convs:
        for times in _MERGES:
            for up in (True, False):  # incomplete tokens are padded, or dropped
                gh, gw = (-(-g // times) if up else g // times for g in conv.grid)
                more = [n * times - g for n, g in zip((gh, gw), conv.grid, strict=True)]  # patches of padding
                axes = zip(conv.geometry.origin, conv.geometry.cell, conv.mirrored, more, strict=True)
                origin = tuple(o - c * n if backwards else o for o, c, backwards, n in axes)
                geometry = GridGeometry(origin, tuple(c * times for c in conv.geometry.cell))
                if gh * gw and geometry.unless_whole((gh, gw), size) is not None:
                    yield PatchConv((gh, gw), geometry, disjoint=False)
