"""Grids of patches: those of the convolutions that saw pixels, and others that tokens could form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.grid import Grid, GridGeometry

_MERGES = (2, 4, 8, 16)  # patches on a side that a coarser token of a pyramid is made of


@dataclass(frozen=True)
class PatchConv:
    """A grid of patches, such as a convolution's output, and where its cells lie in the image's pixels.

    ``disjoint``: the stride equals the kernel, so that every output sees its own pixels only. ``seen`` is the size of
    what the convolution saw, where that is not the image as it is; then ``geometry`` is in pixels of that.
    ``mirrored`` are the axes of the image along which the convolution's own cells follow one another backwards.
    """

    grid: tuple[int, int]
    geometry: GridGeometry
    disjoint: bool
    seen: tuple[int, int] | None = None
    mirrored: tuple[bool, bool] = (False, False)

    @property
    def placed_grid(self) -> Grid:
        """The grid with its geometry."""
        return Grid(self.grid, self.geometry)

    def has_remainder(self, size: tuple[int, int]) -> bool:
        """Whether there are pixels of an image of this size that no cell sees."""
        return any(bool((cells < 0).any()) for cells in self.placed_grid.cells_of_pixels(size))

    def cell_of_pixels(self, size: tuple[int, int]) -> Tensor:
        """The cell that each pixel is in, (H, W), or -1 for those that no cell sees."""
        rows, cols = map(torch.from_numpy, self.placed_grid.cells_of_pixels(size))
        inside = (rows >= 0)[:, None] & (cols >= 0)
        return torch.where(inside, rows[:, None] * self.grid[1] + cols, -1)


def candidate_grids(
    image_size: tuple[int, int], tokens: int, moving: int, convs: Sequence[PatchConv]
) -> Iterator[PatchConv]:
    """Grids that this many tokens could form, of which ``moving`` depend on the image.

    Those of a convolution that saw the pixels come first, else the image's proportions decide.
    """
    height, width = image_size
    whole = [c for c in convs if c.disjoint]
    yield from (c for c in whole if math.prod(c.grid) == moving)
    # Patches that a mask token replaces depend on no image, but keep their place.
    yield from (c for c in whole if moving < math.prod(c.grid) <= tokens)
    # A token that is made of all patches, such as their mean, moves too.
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
    """Coarser grids, where several patches on a side become one token, that do not tile the image."""
    for conv in convs:
        for times in _MERGES:
            for up in (True, False):  # patches that make no whole token are padded, or left out
                gh, gw = (-(-g // times) if up else g // times for g in conv.grid)
                more = [n * times - g for n, g in zip((gh, gw), conv.grid, strict=True)]  # than there are patches
                axes = zip(conv.geometry.origin, conv.geometry.cell, conv.mirrored, more, strict=True)
                origin = tuple(o - c * n if backwards else o for o, c, backwards, n in axes)
                geometry = GridGeometry(origin, tuple(c * times for c in conv.geometry.cell))
                if gh * gw and geometry.unless_whole((gh, gw), size) is not None:
                    yield PatchConv((gh, gw), geometry, disjoint=False)
