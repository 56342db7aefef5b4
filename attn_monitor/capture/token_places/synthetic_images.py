"""Make images that show which token depends on which part of them; `decoding` evaluates the tokens.

*Mosaics*: each cell of a grid shows one of k pictures in each of M images, so that the images that agree in a cell
form a partition of the M images into exactly k classes, a different one for every cell. A token that depends on one
cell alone is equal in exactly those images, which identifies the cell. A token that depends on two cells is equal in
fewer images, and its partition has more than k classes.

*Ramps*: a small change of the whole image is scaled along one axis. How much of a token's change remains gives the
centre of what it depends on, also where receptive fields overlap.

Images are (C, *size), with any number of axes behind the channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_monitor.capture.observe.patch_grids import PatchConv

_LEVELS = 256  # values that noise takes in each channel, and between which it is interpolated
_SAMPLE = 4096  # pixels from which they are taken


def noise_images(images: Tensor, count: int, seed: int = 0, brightness: Tensor | None = None) -> Tensor:
    """Return (count, C, *size) noise with values as they occur in ``images``, without touching the global random state.

    Models divide by 10,000, clip Hounsfield units, take logarithms or round to bytes: noise of another range may reach
    them as one constant. So each channel has `_levels` of its own.

    Args:
        images: (B, C, *size) that give the values, size, dtype and device.
        count: Number of images.
        seed: Seed of the noise.
        brightness: For each noise image, by how many standard deviations it is brighter than the others.
    """
    normal = _normal((count, *images.shape[1:]), seed)
    if brightness is not None:
        normal += brightness.reshape(-1, *(1 for _ in images.shape[1:]))
    # The ends are stretched, so that images have the same minimum and maximum, by which a model may scale them.
    position = ((torch.special.ndtr(normal) - 0.5) * 1.06 + 0.5).clamp(0, 1) * (_LEVELS - 1)
    levels, whole = _levels(images)
    below = position.floor().long().movedim(1, 0).flatten(1)  # (C, count · pixels)
    part = position.frac().movedim(1, 0).flatten(1)
    values = levels.gather(1, below).lerp(levels.gather(1, (below + 1).clamp_max(_LEVELS - 1)), part)
    values = (values.round() if whole else values).unflatten(1, (count, *images.shape[2:])).movedim(0, 1)
    noise: Tensor = values.contiguous().to(device=images.device, dtype=images.dtype)
    return noise


def evenly_changed(images: Tensor, weights: Tensor, seed: int = 8) -> tuple[Tensor, Tensor]:
    """Return two (C, *size) images whose values differ by a quarter of their range, times a weight for each pixel.

    Values are in the middle of the range of ``images``, so that a model that clips it leaves these differences.
    """
    levels, whole = _levels(images)
    low, high = (levels[:, n].reshape(-1, *(1 for _ in images.shape[2:])) for n in (_LEVELS // 10, -_LEVELS // 10))
    normal = _normal((2, *images.shape[1:]), seed)
    one = (low + high) / 2 + (high - low) / 4 * (2 * torch.special.ndtr(normal[0]) - 1)
    other = one + (high - low) / 4 * normal[1].sign() * weights.cpu()
    one, other = ((x.round() if whole else x).to(images) for x in (one, other))
    return one, other


def _levels(images: Tensor) -> tuple[Tensor, bool]:
    """Return (C, levels) sorted values for each channel, and whether the images hold many whole numbers and no others.

    Half of them are quantiles of the values that occur, each counted once, so that a dark background is one value; the
    others are spread evenly between the smallest and the largest. A channel that is constant gets those of all.
    """
    size = images.shape[2:]
    step = max(1, math.ceil((math.prod(size) * len(images) / _SAMPLE) ** (1 / max(len(size), 1))))
    thinned = (slice(None),) * 2 + (slice(None, None, step),) * len(size)
    sample = images[thinned].detach().float().cpu()
    sample = sample.movedim(1, 0).flatten(1)
    found = [values[values.isfinite()].unique() for values in sample]
    together = torch.cat(found).unique()
    if len(together) < 2:
        centre = float(together[0]) if len(together) else 0.0
        shares = torch.linspace(0.002, 0.998, 256, dtype=torch.float32, device="cpu")
        together = centre + max(1.0, abs(centre)) * torch.special.ndtri(shares)
    whole = bool((together == together.round()).all()) and float(together[-1] - together[0]) >= 32
    return torch.stack([_spread(values if len(values) > 1 else together) for values in found]), whole


def _spread(values: Tensor) -> Tensor:
    half = torch.linspace(0, 1, _LEVELS // 2, dtype=torch.float32, device="cpu")  # whatever the run's default
    quantiles = values[(half * (len(values) - 1)).round().long()]
    return torch.cat([quantiles, values[0] + half * (values[-1] - values[0])]).sort().values


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=draw, dtype=torch.float32, device="cpu")


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


def mosaic_codes(conv: PatchConv, size: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the `partition_codes` of the cells of a grid, then one for the pixels outside all cells, if any.

    These pixels have their own code, so that a token that sees them is not taken for one that sees its cell alone.
    """
    return partition_codes(math.prod(conv.grid) + conv.has_remainder(size))


def mosaics(images: Tensor, conv: PatchConv) -> Tensor:
    """Return (M, C, *size) noise images in which each cell of the grid shows the pictures of its `mosaic_codes`."""
    size = images.shape[2:]
    codes = mosaic_codes(conv, size)
    # The first is bright and the others dark: a token order that depends on brightness then differs between images.
    brightness = torch.tensor([0.5, *[-0.5] * max(codes[0])], device="cpu")
    pictures = noise_images(images, len(brightness), seed=1, brightness=brightness)  # (k, C, *size)
    table = torch.tensor(codes, device=images.device)
    shown = table.T[:, conv.cell_of_pixels(size).to(images.device)]  # (M, *size); -1 is the last code
    return pieced_together(pictures, shown)


def pieced_together(pictures: Tensor, shown: Tensor) -> Tensor:
    """Return (M, C, *size) images of which each pixel is that of one of the (k, C, *size) pictures.

    ``shown`` (M, *size) numbers the picture of each pixel.
    """
    index = shown[:, None, None].expand(-1, 1, pictures.shape[1], *shown.shape[1:])
    return pictures[None].expand(len(shown), *pictures.shape).gather(1, index)[:, 0]


def along_axes(values: Sequence[Tensor]) -> list[Tensor]:
    """Reshape the values of the pixels on each axis so that they broadcast over an image (*size)."""
    return [v.view(-1, *(1 for _ in values[axis + 1 :])) for axis, v in enumerate(values)]


def ramps(image: Tensor, strength: float, seed: int = 5) -> Tensor:
    """Add scaled noise to a (C, *size) image.

    Returns:
        (2 + axes, C, *size): the image; with noise; with that noise scaled from 0 to 1 along each axis.
    """
    rising = along_axes([(torch.arange(n, device="cpu") + 0.5) / n for n in image.shape[1:]])
    return _scaled_noise(image, [torch.ones(1, device="cpu"), *rising], strength, seed)


def cell_weighted_noise(
    image: Tensor, conv: PatchConv, strength: float, seed: int = 5, *, inside: bool = False
) -> Tensor:
    """Add noise with a weight for each cell to a (C, *size) image.

    Args:
        image: The image.
        conv: The grid of cells.
        strength: Standard deviation of the noise, relative to that of the image.
        seed: Seed of the noise.
        inside: Whether noise is weaker where values are near the smallest or the largest of their channel, where models
            clip or take logarithms.

    Returns:
        (3, C, *size): the image; with noise; with that noise scaled by the `cell_weights`.
    """
    cells = conv.cell_of_pixels(image.shape[1:])
    weights = torch.where(cells >= 0, cell_weights(math.prod(conv.grid))[cells], 0)
    return _scaled_noise(image, [torch.ones(1, device="cpu"), weights], strength, seed, inside=inside)


def cell_weights(cells: int) -> Tensor:
    """Return a fixed random number from 0 to 1 for each cell."""
    return torch.rand(cells, generator=torch.Generator().manual_seed(11), device="cpu")


def _scaled_noise(
    image: Tensor, scales: Sequence[Tensor], strength: float, seed: int, *, inside: bool = False
) -> Tensor:
    """Stack a (C, *size) image and, for each scale from 0 to 1, the image with noise of that scale.

    Noise that would leave the range of its channel is added with the other sign, as a model may refuse such values.
    """
    values = image.detach().float().cpu()
    spread = values.flatten(1).std(1, correction=0)
    each = (-1, *(1 for _ in image.shape[1:]))  # a number for each channel
    spread = torch.where(spread > 0, spread, float(values.std(correction=0)) or 1.0).view(each)
    low, high = (end.view(each) for end in values.flatten(1).aminmax(dim=1))
    if inside:
        spread = torch.minimum(spread, torch.minimum(values - low, high - values))
    noise = _normal(image.shape, seed) * strength * spread
    leaves = (values + noise < low) | (values + noise > high)
    noise = torch.where(leaves, -noise, noise).to(image)
    return torch.stack([image, *(image + noise * scale.to(image) for scale in scales)])


def small_strength(dtype: torch.dtype) -> float:
    """Return a strength of noise to which a model of this precision responds, and nearly linearly."""
    return max(0.02, 25 * torch.finfo(dtype).eps)


def quarters_of_cells(conv: PatchConv, size: Sequence[int]) -> Tensor:
    """Return (*size): the quarter of the visible part of its cell that each pixel is in; -1 outside cells.

    Each axis is cut in two: there are 2 quarters on one axis, 4 on two and 8 on three.
    """
    halves = []
    for middles, cells in zip(conv.placed_grid.centres(size), conv.placed_grid.cells_of_pixels(size), strict=True):
        halves.append(torch.arange(len(cells), device="cpu") + 0.5 > torch.tensor(middles, device="cpu")[cells])
    quarter = torch.zeros((), dtype=torch.int64, device="cpu")
    for half in along_axes(halves):
        quarter = 2 * quarter + half
    return torch.where(conv.cell_of_pixels(size) >= 0, quarter, -1)


def quarters_changed(image: Tensor, quarters: Tensor, seed: int = 6) -> Tensor:
    """Return (2**axes, C, *size): the (C, *size) image with other noise in one of the `quarters_of_cells` each."""
    other, quarters = noise_images(image[None], 1, seed)[0], quarters.to(image.device)
    return torch.stack([torch.where(quarters == q, other, image) for q in range(2**quarters.ndim)])


def corners_changed(image: Tensor, seed: int = 6) -> Tensor:
    """Return (2, C, *size): the (C, *size) image with other noise in its first corner, and in the opposite one."""
    other, first, last = noise_images(image[None], 1, seed)[0], image.clone(), image.clone()
    quarters = [max(n // 4, 1) for n in image.shape[1:]]
    begin, end = (slice(None), *map(slice, quarters)), (slice(None), *(slice(-n, None) for n in quarters))
    first[begin], last[end] = other[begin], other[end]
    return torch.stack([first, last])


def first_lines_changed(image: Tensor, seed: int = 6) -> Tensor:
    """Return (axes, C, *size): the (C, *size) image with other noise in the first line of pixels on each axis."""
    other, changed = noise_images(image[None], 1, seed)[0], []
    for axis in range(1, image.ndim):
        changed.append(image.clone())
        changed[-1].narrow(axis, 0, 1).copy_(other.narrow(axis, 0, 1))
    return torch.stack(changed)


def middles_changed(image: Tensor, conv: PatchConv, cells: Tensor, seed: int = 6) -> Tensor:
    """Return the (C, *size) image with other noise in the middles of the chosen ``cells``, (N,) bool.

    It has the mean and the spread of the pixels that were there, as a model may standardise each image by its own.
    """
    size = image.shape[1:]
    of_pixels = conv.cell_of_pixels(size)
    chosen = (of_pixels >= 0) & cells[of_pixels]
    middles = []
    for pixels, start, cell in zip(size, conv.geometry.origin, conv.geometry.cell, strict=True):
        from_middle = ((torch.arange(pixels, device="cpu") + 0.5 - start) / cell % 1 - 0.5).abs()
        middles.append(from_middle < max(0.25, 0.51 / cell))  # one or two pixels are the middle of a small cell
    for middle in along_axes(middles):
        chosen = chosen & middle
    before = image.flatten(1)[:, chosen.flatten().to(image.device)].float()
    other = noise_images(image[None], 1, seed)[0].flatten(1)[:, chosen.flatten().to(image.device)].float()
    spread = before.std(1, correction=0, keepdim=True) / other.std(1, correction=0, keepdim=True).clamp_min(1e-30)
    other = (other - other.mean(1, keepdim=True)) * spread + before.mean(1, keepdim=True)
    changed = image.flatten(1).clone()
    changed[:, chosen.flatten().to(image.device)] = other.to(image)
    return changed.view_as(image)


def thirds_changed(image: Tensor, conv: PatchConv, seed: int = 6) -> Tensor:
    """Return (3 · axes, C, *size): the image with other noise in every third line of cells from 0, 1, 2 on.

    The first three change rows of cells, the next three columns, and so on for each axis.
    """
    size, other = image.shape[1:], noise_images(image[None], 1, seed)[0]
    lines = along_axes([torch.from_numpy(c).to(image.device) for c in conv.placed_grid.cells_of_pixels(size)])
    return torch.stack([torch.where((n >= 0) & (n % 3 == third), other, image) for n in lines for third in range(3)])


def border_changed(image: Tensor, conv: PatchConv, seed: int = 6) -> Tensor:
    """Return the (C, *size) image with other noise in the outermost pixels that cells see, an eighth of a cell wide."""
    other, changed = noise_images(image[None], 1, seed)[0], image.clone()
    seen = [torch.from_numpy(c >= 0).nonzero()[:, 0] for c in conv.placed_grid.cells_of_pixels(image.shape[1:])]
    ends = [(int(pixels[0]), int(pixels[-1]) + 1) for pixels in seen]
    edges = [max(1, round(cell / 8)) for cell in conv.geometry.cell]
    outer = (slice(None), *(slice(*axis) for axis in ends))
    inner = (slice(None), *(slice(a + e, max(b - e, 0)) for (a, b), e in zip(ends, edges, strict=True)))
    changed[outer] = other[outer]
    changed[inner] = image[inner]
    return changed
