"""Where the patch tokens stand in a token sequence, found by asking the model and not by knowing its name.

Two questions are put to it with noise images. *Which tokens depend on the image?* Before the first attention, a CLS
token, a register or a distillation token is the same for every image; patch tokens differ. *Which patch is which
token?* Patches are numbered from 1, and one image is made for each binary digit of that number, in which just the
patches with that digit set are changed: the tokens that change spell out their own patch numbers. Both look at V of
the first attention site, so they cost little more than a patch embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.sources import widen

MAX_PREFIX = 64


@dataclass(frozen=True)
class TokenLayout:
    """Token indices of the prefix (CLS first, registers after it) and of the patches in row-major order."""

    grid: tuple[int, int]
    prefix: tuple[int, ...]
    patches: tuple[int, ...]
    proven: bool  # True: every patch token was identified; False: row-major order is assumed (overlapping stems)

    @property
    def order(self) -> tuple[int, ...]:
        """Token indices so that the prefix comes first and the patches follow, row by row."""
        return self.prefix + self.patches


@dataclass(frozen=True)
class PatchConv:
    """Output grid and stride of a convolution seen before the first attention."""

    grid: tuple[int, int]
    stride: tuple[int, int]
    disjoint: bool  # stride equals kernel: every output sees its own pixels only


def noise_images(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` noise images of the same size, type and device, drawn without touching global random state."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, *images.shape[1:]), generator=generator)
    return noise.to(device=images.device, dtype=images.dtype)


def changed_tokens(values: Tensor, reference: Tensor) -> Tensor:
    """Which tokens differ between (B, H, K, D) values and a (1, H, K, D) reference: bool (B, K)."""
    eps = torch.finfo(values.dtype).eps
    values, reference = widen(values), widen(reference)
    change = (values - reference).square().sum((1, 3)).sqrt()
    size = reference.square().sum((1, 3)).sqrt().clamp_min(1e-12)
    return change / size > max(1e-3, 8 * eps)


def candidate_grids(
    image_size: tuple[int, int], tokens: int, static: int, convs: list[PatchConv]
) -> Iterator[PatchConv]:
    """Grids that this many tokens could be: of a convolution that saw the whole image, else of its proportions."""
    height, width = image_size
    patches = tokens - static

    def proportional(grid: tuple[int, int]) -> PatchConv:
        return PatchConv(grid, (round(height / grid[0]), round(width / grid[1])), disjoint=False)

    def covers(conv: PatchConv) -> bool:  # but for a remainder that makes no patch
        return all(0 <= size - g * s < s for size, g, s in zip(image_size, conv.grid, conv.stride, strict=True))

    whole = [c for c in convs if c.disjoint and covers(c)]
    yield from (c for c in whole if math.prod(c.grid) == patches)
    # Patches that a mask token replaces depend on no image, but keep their place.
    yield from (c for c in whole if patches < math.prod(c.grid) <= tokens)
    if patches < 1 or any(math.prod(c.grid) == patches for c in whole):
        return
    overlapping = [c.grid for c in convs if not c.disjoint and math.prod(c.grid) == patches]
    rows = [r for r in range(1, patches + 1) if patches % r == 0]
    gh = min(rows, key=lambda r: abs(math.log((r * r / patches) * (width / height))))
    yield from (proportional(grid) for grid in dict.fromkeys([*overlapping, (gh, patches // gh)]))


def code_images(images: Tensor, conv: PatchConv) -> Tensor:
    """One noise image and, for each binary digit of the patch numbers, a copy with those patches changed."""
    gh, gw = conv.grid
    base, other = noise_images(images, 2, seed=1).unbind(0)
    height, width = base.shape[-2:]
    rows = (torch.arange(height) // conv.stride[0]).clamp_max(gh - 1)
    cols = (torch.arange(width) // conv.stride[1]).clamp_max(gw - 1)
    number = (rows[:, None] * gw + cols + 1).to(base.device)  # (H, W) patch number of every pixel
    digits = range((gh * gw).bit_length())
    return torch.stack([base, *(torch.where((number >> d & 1).bool(), other, base) for d in digits)])


def read_codes(values: Tensor) -> Tensor:
    """Patch number that each token spells out, 0 for tokens that depend on no patch: (K,) from `code_images`."""
    changed = changed_tokens(values[1:], values[:1]).long()
    weights = 2 ** torch.arange(len(changed), device=changed.device)
    return (changed * weights[:, None]).sum(0)


def layout_from_codes(codes: Tensor, conv: PatchConv, static: Tensor) -> TokenLayout | None:
    """The layout that the codes prove, or that overlapping receptive fields at least allow; None when neither."""
    patches = math.prod(conv.grid)
    prefix = tuple(int(i) for i in static.nonzero().flatten())
    numbers = codes.tolist()
    where = {n: i for i, n in enumerate(numbers) if n}
    unambiguous = bool(where) and len(where) == sum(n > 0 for n in numbers) and max(where) <= patches
    if unambiguous and len(where) == patches == len(numbers) - len(prefix):
        return TokenLayout(conv.grid, prefix, tuple(where[n] for n in range(1, patches + 1)), proven=True)
    first = len(numbers) - patches  # tokens in front of the patches, when some patches show mask tokens
    if unambiguous and all(i == first + n - 1 for n, i in where.items()):
        return TokenLayout(conv.grid, tuple(range(first)), tuple(range(first, len(numbers))), proven=True)
    if len(numbers) - len(prefix) != patches:
        return None
    rest = tuple(i for i in range(len(numbers)) if i not in set(prefix))
    # A stem whose fields overlap changes each token with its neighbours' digits too, never with fewer than its own.
    if all(numbers[i] & n == n for n, i in enumerate(rest, 1)):
        return TokenLayout(conv.grid, prefix, rest, proven=False)
    return None
