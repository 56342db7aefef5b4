"""Which part of the image a token holds, told from how tokens change between images that were made up to tell.

Two ways to ask. *Mosaics*: each cell of a grid shows one of k pictures in each of M images, so that the images which
agree in a cell form a partition of the M images into exactly k classes, another one for every cell. A token that
depends on one cell alone is equal in just those images, and so spells out its cell; a token that depends on two cells
is equal in fewer, and no two such partitions agree with a third of k classes. *Ramps*: a small change of the whole
image is scaled by the column, or the row; how much of a token's change is left tells the centre of what it holds, also
where receptive fields overlap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STATIC, SEVERAL = -1, -2  # in place of a cell: holds nothing of the image; holds more than one cell
SKETCH = 16  # numbers that stand for one token's channels: random projections keep distances

Places = tuple[int, ...]
"""The cell that each token holds, row by row from 0, or `STATIC`, or `SEVERAL`."""


@dataclass(frozen=True)
class TokenLayout:
    """Token indices of the prefix (CLS first, registers after it) and of the patches in row-major order.

    ``evidence`` says how the places are known: "exact", each token changes with its own cell and with no other; "exact
    but masked", likewise, and tokens that a mask token replaced stand between the others; "centres", fields overlap,
    and tokens are ordered by the centre of what they hold.
    """

    grid: tuple[int, int]
    prefix: tuple[int, ...]
    patches: tuple[int, ...]
    evidence: str

    @property
    def order(self) -> tuple[int, ...]:
        """Token indices so that the prefix comes first and the patches follow, row by row."""
        return self.prefix + self.patches


@dataclass(frozen=True)
class PatchConv:
    """Output grid and stride of a convolution on whole images."""

    grid: tuple[int, int]
    stride: tuple[int, int]
    disjoint: bool  # stride equals kernel: every output sees its own pixels only


def noise_images(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` noise images of the same size, type and device, drawn without touching global random state."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, *images.shape[1:]), generator=generator)
    return noise.to(device=images.device, dtype=images.dtype)


def threshold(dtype: torch.dtype, device: torch.device) -> float:
    """By how much, relative to its size, a token has to differ to count as changed."""
    rounding = 4e-3 if device.type == "cuda" and dtype == torch.float32 else 1e-3  # products may run in TF32
    return max(rounding, 8 * torch.finfo(dtype).eps)


def candidate_grids(
    image_size: tuple[int, int], tokens: int, moving: int, convs: Sequence[PatchConv]
) -> Iterator[PatchConv]:
    """Grids that this many tokens, of which some hold parts of the image, could be.

    Those of a convolution that saw the whole image come first, else the image's proportions tell.
    """
    height, width = image_size
    whole = [c for c in convs if c.disjoint and is_covering(c, image_size)]
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


def is_covering(conv: PatchConv, size: tuple[int, int]) -> bool:
    """Whether its patches cover an image of this size, but for a remainder that makes no patch."""
    return all(0 <= s - g * step < step for s, g, step in zip(size, conv.grid, conv.stride, strict=True))


def cell_of_pixels(conv: PatchConv, size: tuple[int, int]) -> Tensor:
    """The cell that each pixel is in, (H, W), or -1 for a remainder that no patch covers."""
    (gh, gw), (height, width) = conv.grid, size
    sh, sw = conv.stride if is_covering(conv, size) else (height / gh, width / gw)
    rows, cols = (torch.arange(height) / sh).floor().long(), (torch.arange(width) / sw).floor().long()
    inside = (rows < gh)[:, None] & (cols < gw)
    return torch.where(inside, rows[:, None] * gw + cols, -1)


@functools.lru_cache(maxsize=64)
def partition_codes(cells: int) -> tuple[tuple[int, ...], ...]:
    """For each cell, which of k pictures it shows in each of M images; M is the smallest that tells all cells apart.

    Every code uses all k pictures: a partition into k classes is never finer than another one.
    """
    images = 2
    while (best := max((_stirling(images, k), k) for k in range(2, images + 1)))[0] < cells:
        images += 1
    codes = list(_partitions(images, best[1]))
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(cells)).tolist()
    return tuple(codes[i] for i in order[:cells])


@functools.lru_cache(maxsize=1024)
def _stirling(n: int, k: int) -> int:
    """How many partitions of n things into k classes there are."""
    if k in (1, n):
        return 1
    return 0 if k > n else k * _stirling(n - 1, k) + _stirling(n - 1, k - 1)


def _partitions(n: int, k: int) -> Iterator[tuple[int, ...]]:
    """Partitions of n things into k classes, classes numbered in the order in which they appear."""

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


def mosaics(images: Tensor, conv: PatchConv) -> Tensor:
    """Noise images (M, C, H, W) in which each cell of the grid shows the pictures of its `partition_codes`."""
    codes = partition_codes(math.prod(conv.grid))
    pictures = noise_images(images, max(codes[0]) + 1, seed=1)  # (k, C, H, W)
    # The first is bright and the others dark: an order that hangs on brightness is not the same in all images.
    pictures = pictures + torch.tensor([0.5, *[-0.5] * max(codes[0])]).to(pictures)[:, None, None, None]
    table = torch.tensor([*codes, [0] * len(codes[0])], device=images.device)  # pixels outside show the first
    shown = table.T[:, cell_of_pixels(conv, (images.shape[-2], images.shape[-1])).to(images.device)]  # (M, H, W)
    index = shown[:, None, None].expand(-1, 1, images.shape[1], -1, -1)
    return pictures[None].expand(len(shown), -1, -1, -1, -1).gather(1, index)[:, 0]


def read_places(sketches: Tensor, cells: int, limit: float) -> Places:
    """The cell that each token spells out, from sketches (M, T, S) of the tokens in the images of `mosaics`."""
    apart = changes(sketches[:, None], sketches[None])  # (M, M, T)
    labels = (apart > limit).long().cumprod(1).sum(1).T.tolist()  # the first image that each one is equal to
    known = {code: cell for cell, code in enumerate(partition_codes(cells))}
    places = []
    for token in labels:
        classes = {first: number for number, first in enumerate(dict.fromkeys(token))}
        code = tuple(classes[first] for first in token)
        places.append(STATIC if len(classes) == 1 else known.get(code, SEVERAL))
    return tuple(places)


def changes(sketches: Tensor, reference: Tensor) -> Tensor:
    """By how much tokens differ, relative to the larger of the two: (..., T) of (..., T, S)."""
    apart = (sketches - reference).norm(dim=-1)
    size = torch.maximum(sketches.norm(dim=-1), reference.norm(dim=-1))
    return torch.where(apart > 0, apart / size.clamp_min(1e-30), 0).nan_to_num(math.inf, math.inf, math.inf)


def is_whole(places: Places | None, cells: int) -> bool:
    """Whether every cell is held by exactly one token."""
    return places is not None and sorted(p for p in places if p >= 0) == list(range(cells))


def has_own(places: Places) -> bool:
    """Whether tokens of a part of their own are the rule, and those that hold several are few, such as a mean.

    Where fields overlap, some tokens lie inside a cell of a coarser grid than theirs, and the others between them.
    """
    return places.count(SEVERAL) <= min(8, max(sum(p >= 0 for p in places) - 1, 0))


def layout_of(places: Places, grid: tuple[int, int], evidence: str) -> TokenLayout | None:
    """The layout that places amount to, None where cells are missing or held twice."""
    cells = math.prod(grid)
    if is_whole(places, cells) and has_own(places):
        where = {place: token for token, place in enumerate(places) if place >= 0}
        prefix = tuple(token for token, place in enumerate(places) if place < 0)
        return TokenLayout(grid, prefix, tuple(where[cell] for cell in range(cells)), evidence)
    # Where some patches show a mask token, the others must stand in row-major order behind the prefix.
    first, seen = len(places) - cells, [(t, p) for t, p in enumerate(places) if p >= 0]
    if first >= 0 and SEVERAL not in places and 2 * len(seen) > cells and all(t == first + p for t, p in seen):
        return TokenLayout(grid, tuple(range(first)), tuple(range(first, len(places))), f"{evidence} but masked")
    return None


def ramps(image: Tensor, strength: float, seed: int = 5) -> Tensor:
    """(4, C, H, W): the (C, H, W) image; with a little noise; with that noise scaled by the row; by the column."""
    height, width = image.shape[-2:]
    rows, cols = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return _scaled_noise(image, [torch.ones(1, 1), rows[:, None], cols[None]], strength, seed)


def weighted(image: Tensor, conv: PatchConv, strength: float, seed: int = 5) -> Tensor:
    """(3, C, H, W): the (C, H, W) image; with a little noise; with that noise scaled by a weight for each cell."""
    cells = cell_of_pixels(conv, (image.shape[-2], image.shape[-1]))
    weights = torch.where(cells >= 0, cell_weights(math.prod(conv.grid))[cells], 0)
    return _scaled_noise(image, [torch.ones(1, 1), weights], strength, seed)


def cell_weights(cells: int) -> Tensor:
    """A number from 0 to 1 for each cell, in no order."""
    return torch.rand(cells, generator=torch.Generator().manual_seed(11))


def _scaled_noise(image: Tensor, scales: Sequence[Tensor], strength: float, seed: int) -> Tensor:
    noise = noise_images(image[None], 1, seed)[0] * strength * (float(image.float().std(correction=0)) or 1.0)
    return torch.stack([image, *(image + noise * scale.to(image) for scale in scales)])


def little(dtype: torch.dtype) -> float:
    """How strong a change may be for a model of this precision to answer in proportion, and to answer at all."""
    return max(0.02, 25 * torch.finfo(dtype).eps)


def quadrants_changed(image: Tensor, conv: PatchConv, seed: int = 6) -> Tensor:
    """(4, C, H, W): the (C, H, W) image with other noise in one quarter of every cell."""
    (gh, gw), (height, width) = conv.grid, image.shape[-2:]
    lower, right = ((torch.arange(n) * 2 * g // n) % 2 for n, g in ((height, gh), (width, gw)))
    quarter = (2 * lower[:, None] + right).to(image.device)
    other = noise_images(image[None], 1, seed)[0]
    return torch.stack([torch.where(quarter == q, other, image) for q in range(4)])


def corners_changed(image: Tensor, seed: int = 6) -> Tensor:
    """(2, C, H, W): the (C, H, W) image with other noise in its first corner, and in the opposite one."""
    height, width = (n // 4 for n in image.shape[-2:])
    other = noise_images(image[None], 1, seed)[0]
    first, last = image.clone(), image.clone()
    first[:, :height, :width] = other[:, :height, :width]
    last[:, -height:, -width:] = other[:, -height:, -width:]
    return torch.stack([first, last])


def outermost_changed(image: Tensor, conv: PatchConv, seed: int = 6) -> Tensor:
    """The (C, H, W) image with other noise in its outermost pixels, an eighth of a cell wide."""
    _, height, width = image.shape
    edge = max(1, round(min(height / conv.grid[0], width / conv.grid[1]) / 8))
    other = noise_images(image[None], 1, seed)[0]
    other[:, edge : height - edge, edge : width - edge] = image[:, edge : height - edge, edge : width - edge]
    return other


def shares(sketches: Tensor, limit: float) -> Tensor:
    """How much of the whole change each token keeps when it is scaled: (n, ..., T) of (2 + n, ..., T, S) sketches.

    The change under a scale, projected on the whole change, is the scale where the token looks: a mean over what it
    holds. NaN where nothing moves.
    """
    base, whole, *scaled = sketches.double().unbind(0)
    change = whole - base
    energy, moved = change.square().sum(-1).clamp_min(1e-60), changes(whole, base) > limit
    return torch.stack([torch.where(moved, ((s - base) * change).sum(-1) / energy, math.nan) for s in scaled])


def centres(sketches: Tensor, grid: tuple[int, int], limit: float) -> Tensor:
    """(row, column) of the centre of what each token holds, in cells: (2, ..., T) of (4, ..., T, S) from `ramps`."""
    share = shares(sketches, limit)
    return share * torch.tensor(grid).to(share).reshape(2, *(1 for _ in share.shape[1:])) - 0.5


def cells_by_rank(centre: Tensor, grid: tuple[int, int]) -> Tensor:
    """(T,) cells of the rows and the columns into which (2, T) centres are ranked."""
    gh, gw = grid
    rows, cols = (ranked.argsort().argsort() // size for ranked, size in zip(centre, (gw, gh), strict=True))
    cells: Tensor = rows * gw + cols
    return cells


def places_by_centre(centre: Tensor, grid: tuple[int, int]) -> Places | None:
    """Rank the (2, T) centres into rows and columns; None where they are not one token for each cell of the grid."""
    (gh, gw), live = grid, ~centre.isnan().any(0)
    if int(live.sum()) != gh * gw:
        return None
    cell = cells_by_rank(centre[:, live], grid)
    ranks, cells = torch.stack([cell // gw, cell % gw]), cell.tolist()
    slack = torch.tensor([0.9 + 0.03 * gh, 0.9 + 0.03 * gw], device=centre.device)  # borders are drawn inwards
    if bool(((centre[:, live] - ranks).abs() > slack[:, None]).any()) or sorted(cells) != list(range(gh * gw)):
        return None
    found = iter(cells)
    return tuple(next(found) if alive else STATIC for alive in live.tolist())


def other_weights(share: Tensor, places: Places, cells: int, slack: float) -> float:
    """Share of the tokens with a place that do not tell the weight of their cell: from (T,) `shares` of `weighted`."""
    tokens = [t for t, p in enumerate(places) if p >= 0]
    expected = cell_weights(cells).to(share)[[places[t] for t in tokens]]
    apart = (share[tokens] - expected).abs()
    told = ~apart.isnan()
    return float((apart[told] > slack).double().mean()) if bool(told.any()) else 0.0


def far_from(centre: Tensor, places: Places, grid: tuple[int, int], slack: float) -> float:
    """Share of the tokens with a place whose (2, T) centre is more than ``slack`` cells away from it."""
    tokens = [t for t, p in enumerate(places) if p >= 0]
    cells = torch.tensor([places[t] for t in tokens], device=centre.device)
    expected = torch.stack([cells // grid[1], cells % grid[1]])
    apart = (centre[:, tokens] - expected).abs().amax(0)
    told = ~apart.isnan()
    return float((apart[told] > slack).double().mean()) if bool(told.any()) else 0.0
