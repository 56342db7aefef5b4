"""List the patch grids that tokens could form: those of convolutions on pixels, and others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attn_monitor.capture.observe.memory import Memory
from attn_monitor.grid import Grid, GridGeometry

_MERGES = (2, 4, 8, 16)  # patches per side in a coarser token of a pyramid


@dataclass(frozen=True)
class PatchConv:
    """Describe a patch grid, such as a convolution's output, and the pixels of its cells.

    Attributes:
        grid: Number of cells on each axis.
        geometry: Origin and size of the cells, in pixels of the image, or of the ``seen`` input if that is given.
        disjoint: Whether the stride equals the kernel, so that every cell sees its own pixels only. Otherwise cells
            are the middles of what the kernel sees.
        seen: Size of the convolution's input on each of its axes if it is not the unchanged image, else None.
        on_pixels: Whether it is a convolution's, on pixels.
        mirrored: Whether the convolution's cells run backwards along each axis of the image.
    """

    grid: tuple[int, ...]
    geometry: GridGeometry
    disjoint: bool
    seen: tuple[int, ...] | None = None
    mirrored: tuple[bool, ...] = ()
    on_pixels: bool = False

    @property
    def placed_grid(self) -> Grid:
        """Return the grid together with its geometry."""
        return Grid(self.grid, self.geometry)

    def has_remainder(self, size: Sequence[int]) -> bool:
        """Return whether no cell covers some pixels of an image of this size."""
        return any(bool((cells < 0).any()) for cells in self.placed_grid.cells_of_pixels(size))

    def cell_of_pixels(self, size: Sequence[int]) -> Tensor:
        """Return the cell index of each pixel, (*size), or -1 where no cell covers it."""
        return self.placed_grid.cell_of_pixels(size)


class ObservedConvolutions:
    """Collect the grids of the convolutions on images, or on features of whole images, in one forward.

    Args:
        images: (B, C, *size), those that the model runs on.
    """

    def __init__(self, images: Tensor) -> None:
        self.found: list[PatchConv] = []
        self._batch, self._channels, *self._size = images.shape
        self._images, self._strides = Memory(images), images.stride()
        self._cropped = False  # the current convolutions see a part of the images

    def add(self, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """Keep the grid of a convolution.

        Returns:
            Its input (B, C, *size), if it sees pixels, but not the unchanged images; None otherwise.
        """
        x, of_frames = args[0], self._size[: len(self._size) - (out.ndim - 2)]
        if out.ndim - 2 > len(self._size) or out.shape[0] != self._batch * math.prod(of_frames):
            return None
        # A convolution that runs on single frames, with a batch of them, has a kernel of one frame.
        x, out = (with_frames(t, (self._batch, *of_frames)) for t in (x, out))
        each = [1] * len(of_frames)
        rank, kernel = out.ndim - 2 - len(each), (*each, *args[1].shape[2:])
        stride, padding = ((*each, *a * (rank // len(a))) for a in args[3:5])  # one number stands for all axes
        padding = (*(0 for _ in each), *padding[len(each) :])
        on_pixels = x.shape[1] == self._channels
        if on_pixels:
            sizes = (sorted(size) for size in (x.shape[2:], self._size))  # axes may be exchanged
            self._cropped = any(seen < whole for seen, whole in zip(*sizes, strict=True))
        disjoint = on_pixels and kernel == stride
        if self._cropped and not disjoint:
            return None
        overlap = [(k - s) / 2 if on_pixels else 0.0 for k, s in zip(kernel, stride, strict=True)]
        origin = tuple(float(o - p) for o, p in zip(overlap, padding, strict=True))
        geometry = GridGeometry(origin, tuple(map(float, stride)), tuple(overlap))
        grid, size = tuple(out.shape[2:]), tuple(x.shape[2:])
        # A mirrored image has the same size; where orientation matters, accept only the image's own memory.
        same_memory = self._images.holds(x) and x.stride() == self._strides
        tiled = geometry.unless_whole(grid, size) is None or same_memory
        seen = None if [*size] == self._size and tiled else size
        self.found.append(PatchConv(grid, geometry, disjoint, seen, on_pixels=on_pixels))
        return x if on_pixels and seen is not None else None


def with_frames(x: Tensor, batch: Sequence[int]) -> Tensor:
    """Return (B · frames, C, …) as (B, C, *frames, …), for ``batch`` = (B, *frames)."""
    frames: Tensor = x.unflatten(0, tuple(batch))
    return frames.movedim(len(batch), 1)


def candidate_grids(
    image_size: Sequence[int], tokens: int, moving: int, convs: Sequence[PatchConv]
) -> Iterator[PatchConv]:
    """Yield the grids that tokens could form, those of convolutions on pixels first.

    Args:
        image_size: Number of pixels on each axis.
        tokens: Number of tokens.
        moving: Number of tokens that depend on the image.
        convs: The convolutions that ran on the images.
    """
    whole = [c for c in convs if c.disjoint]
    yield from (c for c in whole if math.prod(c.grid) == moving)
    # A mask token does not depend on the image, but stands for a patch.
    yield from (c for c in whole if moving < math.prod(c.grid) <= tokens)
    # A token computed from all patches, such as their mean, depends on the image too.
    yield from (c for c in whole if moving - 8 <= math.prod(c.grid) < moving)
    if moving < 1 or any(math.prod(c.grid) == moving for c in whole):
        return
    yield from (c for c in _merged(whole, image_size) if math.prod(c.grid) == moving)
    overlapping = [c for c in convs if c not in whole and math.prod(c.grid) == moving]
    yield from (c for c in overlapping if _leaves_out(c, image_size))
    pooled = [g for c in convs if c not in whole and len(image_size) > 2 for g in _pooled(c.grid, moving)]
    for grid in dict.fromkeys([*(c.grid for c in overlapping), *pooled, _most_like(image_size, moving)]):
        yield PatchConv(grid, Grid(grid).placed(image_size), disjoint=False)


_BORDER = 0.4  # of a cell: less is left out, or padded, by many stems, whose maps are laid over the whole image


def _leaves_out(conv: PatchConv, size: Sequence[int]) -> bool:
    """Return whether the overlapping cells of a convolution on pixels begin or end far from the image's border."""
    axes = zip(conv.geometry.origin, conv.geometry.cell, conv.grid, size, strict=True)
    return conv.on_pixels and any(max(abs(o), abs(o + c * g - n)) > _BORDER * c for o, c, g, n in axes)


def _pooled(grid: Sequence[int], cells: int) -> list[tuple[int, ...]]:
    """Return the grids of so many cells that pooling could make of another one, alike on the last two axes first.

    With two axes the grid most like the image is one of them.
    """
    factors = itertools.product((1, 2, 4, 8), repeat=len(grid))
    smaller = {f: tuple(n // by for n, by in zip(grid, f, strict=True)) for f in factors}
    found = [f for f, g in smaller.items() if math.prod(g) == cells]
    return [smaller[f] for f in sorted(found, key=lambda f: (max(f[-2:]) / min(f[-2:]), f))]


def _most_like(size: Sequence[int], cells: int) -> tuple[int, ...]:
    """Return the grid of so many cells with the most regular cells: the one most like the image."""
    if len(size) == 1:
        return (cells,)
    side = (math.prod(size) / cells) ** (1 / len(size))
    counts = [n for n in range(1, cells + 1) if cells % n == 0]
    first = min(counts, key=lambda n: abs(math.log(n * side / size[0])))
    return first, *_most_like(size[1:], cells // first)


def _merged(convs: Sequence[PatchConv], size: Sequence[int]) -> Iterator[PatchConv]:
    """Yield coarser grids that merge several patches per side into one token and do not tile the image."""
    for conv in convs:
        for times in _MERGES:
            for up in (True, False):  # incomplete tokens are padded, or dropped
                grid = tuple(-(-g // times) if up else g // times for g in conv.grid)
                more = [n * times - g for n, g in zip(grid, conv.grid, strict=True)]  # patches of padding
                mirrored = conv.mirrored or (False,) * len(grid)
                axes = zip(conv.geometry.origin, conv.geometry.cell, mirrored, more, strict=True)
                origin = tuple(o - c * n if backwards else o for o, c, backwards, n in axes)
                geometry = GridGeometry(origin, tuple(c * times for c in conv.geometry.cell))
                if math.prod(grid) and geometry.unless_whole(grid, size) is not None:
                    yield PatchConv(grid, geometry, disjoint=False)
