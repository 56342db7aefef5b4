"""Grids of patches: those of the convolutions that saw the whole image, and others that tokens could form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchConv:
    """Output grid and stride of a convolution on whole images."""

    grid: tuple[int, int]
    stride: tuple[int, int]
    disjoint: bool  # stride equals kernel: every output sees its own pixels only

    def covers(self, size: tuple[int, int]) -> bool:
        """Whether its patches cover an image of this size, but for a remainder that makes no patch."""
        return all(0 <= s - g * step < step for s, g, step in zip(size, self.grid, self.stride, strict=True))

    def cell_of_pixels(self, size: tuple[int, int]) -> Tensor:
        """The cell that each pixel is in, (H, W), or -1 for a remainder that no patch covers."""
        (gh, gw), (height, width) = self.grid, size
        sh, sw = self.stride if self.covers(size) else (height / gh, width / gw)
        rows, cols = (torch.arange(height) / sh).floor().long(), (torch.arange(width) / sw).floor().long()
        inside = (rows < gh)[:, None] & (cols < gw)
        return torch.where(inside, rows[:, None] * gw + cols, -1)


def candidate_grids(
    image_size: tuple[int, int], tokens: int, moving: int, convs: Sequence[PatchConv]
) -> Iterator[PatchConv]:
    """Grids that this many tokens could form, of which ``moving`` depend on the image.

    Those of a convolution that saw the whole image come first, else the image's proportions decide.
    """
    height, width = image_size
    whole = [c for c in convs if c.disjoint and c.covers(image_size)]
    yield from (c for c in whole if math.prod(c.grid) == moving)
    # Patches that a mask token replaces depend on no image, but keep their place.
    yield from (c for c in whole if moving < math.prod(c.grid) <= tokens)
    # A token that is made of all patches, such as their mean, moves too.
    yield from (c for c in whole if moving - 8 <= math.prod(c.grid) < moving)
    if moving < 1 or any(math.prod(c.grid) == moving for c in whole):
        return
    overlapping = [c.grid for c in convs if c not in whole and math.prod(c.grid) == moving]
    rows = [r for r in range(1, moving + 1) if moving % r == 0]
    gh = min(rows, key=lambda r: abs(math.log((r * r / moving) * (width / height))))
    for grid in dict.fromkeys([*overlapping, (gh, moving // gh)]):
        yield PatchConv(grid, (round(height / grid[0]), round(width / grid[1])), disjoint=False)
