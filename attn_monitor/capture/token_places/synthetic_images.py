"""Make images that show which token depends on which part of them; `decoding` evaluates the tokens.

*Mosaics*: each cell of a grid shows one of k pictures in each of M images, so that the images that agree in a cell
form a partition of the M images into exactly k classes, a different one for every cell. A token that depends on one
cell alone is equal in exactly those images, which identifies the cell. A token that depends on two cells is equal in
fewer images, and its partition has more than k classes.

*Ramps*: a small change of the whole image is scaled by the column, or the row. How much of a token's change remains
gives the centre of what it depends on, also where receptive fields overlap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_monitor.capture.observe.patch_grids import PatchConv


def noise_images(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return (count, C, H, W) noise like ``images``, without touching the global random state."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, *images.shape[1:]), generator=generator, device="cpu")
    return noise.to(device=images.device, dtype=images.dtype)


@functools.lru_cache(maxsize=64)
def partition_codes(cells: int) -> tuple[tuple[int, ...], ...]:
    """Return for each cell the picture, 0 to k - 1, that it shows in each of M images, with the smallest possible M.

    Every code uses all k pictures, as a partition into k classes is never finer than another one.
    """
    images = 2
    while (best := max((_stirling(images, k), k) for k in range(2, images + 1)))[0] < cells:
        images += 1
    codes = list(_partitions(images, best[1]))
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(cells), device="cpu").tolist()
    return tuple(codes[i] for i in order[:cells])


@functools.lru_cache(maxsize=1024)
def _stirling(n: int, k: int) -> int:
    """Count the partitions of n elements into k classes."""
    if k in (1, n):
        return 1
    return 0 if k > n else k * _stirling(n - 1, k) + _stirling(n - 1, k - 1)


def _partitions(n: int, k: int) -> Iterator[tuple[int, ...]]:
    """Iterate over the partitions of n elements into k classes, numbered in the order in which they appear."""

    def extend(head: tuple[int, ...], used: int) -> Iterator[tuple[int, ...]]:
        left = n - len(head)
        if left == 0:
            yield head
            return
        for label in range(min(used + 1, k)):
            now = max(used, label + 1)
            if k - now < left:
                yield from extend((*head, label), now)

    yield from extend((), 0)


def mosaic_codes(conv: PatchConv, size: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Return the `partition_codes` of the cells of a grid, then one for the pixels outside all cells, if any.

    These pixels have their own code, so that a token that sees them is not taken for one that sees its cell alone.
    """
    return partition_codes(math.prod(conv.grid) + conv.has_remainder(size))


def mosaics(images: Tensor, conv: PatchConv) -> Tensor:
    """Return (M, C, H, W) noise images in which each cell of the grid shows the pictures of its `mosaic_codes`."""
    size = images.shape[-2], images.shape[-1]
    codes = mosaic_codes(conv, size)
    pictures = noise_images(images, max(codes[0]) + 1, seed=1)  # (k, C, H, W)
    # The first is bright and the others dark: a token order that depends on brightness then differs between images.
    pictures = pictures + torch.tensor([0.5, *[-0.5] * max(codes[0])], device="cpu").to(pictures)[:, None, None, None]
    table = torch.tensor(codes, device=images.device)
    shown = table.T[:, conv.cell_of_pixels(size).to(images.device)]  # (M, H, W); -1 is the last code
    index = shown[:, None, None].expand(-1, 1, images.shape[1], -1, -1)
    return pictures[None].expand(len(shown), -1, -1, -1, -1).gather(1, index)[:, 0]


def ramps(image: Tensor, strength: float, seed: int = 5) -> Tensor:
    """Add scaled noise to a (C, H, W) image.

    Returns:
        (4, C, H, W): the image; with noise; with that noise scaled from 0 to 1 by the row; by the column.
    """
    height, width = image.shape[-2:]
    rows, cols = (torch.arange(height, device="cpu") + 0.5) / height, (torch.arange(width, device="cpu") + 0.5) / width
    return _scaled_noise(image, [torch.ones(1, 1, device="cpu"), rows[:, None], cols[None]], strength, seed)


def cell_weighted_noise(image: Tensor, conv: PatchConv, strength: float, seed: int = 5) -> Tensor:
    """Add noise with a weight for each cell to a (C, H, W) image.

    Returns:
        (3, C, H, W): the image; with noise; with that noise scaled by the `cell_weights`.
    """
    cells = conv.cell_of_pixels((image.shape[-2], image.shape[-1]))
    weights = torch.where(cells >= 0, cell_weights(math.prod(conv.grid))[cells], 0)
    return _scaled_noise(image, [torch.ones(1, 1, device="cpu"), weights], strength, seed)


def cell_weights(cells: int) -> Tensor:
    """Return a fixed random number from 0 to 1 for each cell."""
    return torch.rand(cells, generator=torch.Generator().manual_seed(11), device="cpu")


def _scaled_noise(image: Tensor, scales: Sequence[Tensor], strength: float, seed: int) -> Tensor:
    noise = noise_images(image[None], 1, seed)[0] * strength * (float(image.float().std(correction=0)) or 1.0)
    return torch.stack([image, *(image + noise * scale.to(image) for scale in scales)])


def small_strength(dtype: torch.dtype) -> float:
    """Return a strength of noise to which a model of this precision responds, and nearly linearly."""
    return max(0.02, 25 * torch.finfo(dtype).eps)


def quarters_of_cells(conv: PatchConv, size: tuple[int, int]) -> Tensor:
    """Return (H, W): the quarter, 0 to 3, of the visible part of its cell that each pixel is in; -1 outside cells."""
    halves = []
    for middles, cells in zip(conv.placed_grid.centres(size), conv.placed_grid.cells_of_pixels(size), strict=True):
        halves.append(torch.arange(len(cells), device="cpu") + 0.5 > torch.tensor(middles, device="cpu")[cells])
    lower, right = halves
    return torch.where(conv.cell_of_pixels(size) >= 0, 2 * lower[:, None].long() + right, -1)


def quarters_changed(image: Tensor, quarters: Tensor, seed: int = 6) -> Tensor:
    """Return (4, C, H, W): the (C, H, W) image with other noise in one of the `quarters_of_cells` each."""
    other, quarters = noise_images(image[None], 1, seed)[0], quarters.to(image.device)
    return torch.stack([torch.where(quarters == q, other, image) for q in range(4)])


def corners_changed(image: Tensor, seed: int = 6) -> Tensor:
    """Return (2, C, H, W): the (C, H, W) image with other noise in its first corner, and in the opposite one."""
    height, width = (n // 4 for n in image.shape[-2:])
    other = noise_images(image[None], 1, seed)[0]
    first, last = image.clone(), image.clone()
    first[:, :height, :width] = other[:, :height, :width]
    last[:, -height:, -width:] = other[:, -height:, -width:]
    return torch.stack([first, last])


def middles_changed(image: Tensor, conv: PatchConv, seed: int = 6) -> Tensor:
    """Return the (C, H, W) image with other noise in the middles of every second cell, as on a chessboard."""
    size = (image.shape[-2], image.shape[-1])
    cells = [torch.from_numpy(c) for c in conv.placed_grid.cells_of_pixels(size)]
    middle = []
    for pixels, start, cell in zip(size, conv.geometry.origin, conv.geometry.cell, strict=True):
        middle.append(((torch.arange(pixels, device="cpu") + 0.5 - start) / cell % 1 - 0.5).abs() < 0.25)
    dark = (cells[0][:, None] + cells[1]) % 2 == 0
    chosen = dark & middle[0][:, None] & middle[1] & (conv.cell_of_pixels(size) >= 0)
    return torch.where(chosen.to(image.device), noise_images(image[None], 1, seed)[0], image)


def thirds_changed(image: Tensor, conv: PatchConv, seed: int = 6) -> Tensor:
    """Return (6, C, H, W): the image with other noise in every third row of cells from 0, 1, 2 on, then in columns."""
    size, other = (image.shape[-2], image.shape[-1]), noise_images(image[None], 1, seed)[0]
    rows, cols = (torch.from_numpy(c).to(image.device) for c in conv.placed_grid.cells_of_pixels(size))
    lines = (rows[:, None].expand(size), cols[None].expand(size))
    return torch.stack([torch.where((n >= 0) & (n % 3 == third), other, image) for n in lines for third in range(3)])


def border_changed(image: Tensor, conv: PatchConv, seed: int = 6) -> Tensor:
    """Return the (C, H, W) image with other noise in the outermost pixels that cells see, an eighth of a cell wide."""
    edge, changed = max(1, round(min(conv.geometry.cell) / 8)), image.clone()
    other = noise_images(image[None], 1, seed)[0]
    seen = [torch.from_numpy(c >= 0).nonzero()[:, 0] for c in conv.placed_grid.cells_of_pixels(image.shape[-2:])]
    (top, bottom), (left, right) = ((int(pixels[0]), int(pixels[-1]) + 1) for pixels in seen)
    changed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    inner = slice(top + edge, max(bottom - edge, 0)), slice(left + edge, max(right - edge, 0))
    changed[:, inner[0], inner[1]] = image[:, inner[0], inner[1]]
    return changed
