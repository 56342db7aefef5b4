"""Vision transformers on images of one, two or three axes: clips, volumes, spectrograms, signals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.support.styles import DIM, Block, Packed, sdpa

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class AnyViT(nn.Module):
    """A plain ViT on (B, C, *size).

    Args:
        size: of the image.
        patch: its size on each axis.
        channels: of the image.
        cls: whether a CLS token comes first.
        linear: whether patches are cut out and multiplied, without a convolution.
        order: what the order of the patch tokens is in the model, None for row by row.
        attend: computes attention, as in `Packed`.
    """

    def __init__(
        self,
        size: Sequence[int],
        patch: Sequence[int],
        *,
        channels: int = 3,
        cls: bool = True,
        linear: bool = False,
        order: Tensor | None = None,
        depth: int = 2,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = sdpa,
    ) -> None:
        super().__init__()
        self.patch, self.linear, self.order = tuple(patch), linear, order
        self.grid = tuple(n // p for n, p in zip(size, patch, strict=True))
        pixels = channels * math.prod(patch)
        conv = CONVOLUTIONS[len(size)]
        self.embed = nn.Linear(pixels, DIM) if linear else conv(channels, DIM, self.patch, self.patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM)) if cls else None
        self.positions = nn.Parameter(0.5 * torch.randn(1, cls + math.prod(self.grid), DIM))
        self.blocks = nn.ModuleList(Block(Packed(attend)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(self._cut(x)) if self.linear else self.embed(x).flatten(2).mT
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        tokens = tokens + self.positions
        if self.order is not None:
            first = tokens.shape[1] - len(self.order)
            tokens = torch.cat([tokens[:, :first], tokens[:, first:][:, self.order]], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def _cut(self, x: Tensor) -> Tensor:
        """(B, C, *size) to (B, cells, C · pixels), the last axis running fastest."""
        axes = len(self.grid)
        for axis, (cells, pixels) in enumerate(zip(self.grid, self.patch, strict=True)):
            x = x.unflatten(2 + 2 * axis, (cells, pixels))
        cells_first = x.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
        return cells_first.flatten(1 + axes).flatten(1, axes)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by two einsums with heads first, as MONAI's `SABlock` has it; takes and gives (B, N, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v).transpose(1, 2)


class BandsViT(nn.Module):
    """A ViT with a token for each group of channels of each patch, as SatMAE has, or for each channel, as ChannelViT.

    Args:
        groups: the channels of each group; None for one convolution that each channel goes through alone.
        channels: of the image of 16 × 24 pixels.
    """

    def __init__(self, groups: Sequence[Sequence[int]] | None, channels: int = 6) -> None:
        super().__init__()
        self.groups = groups
        each = [nn.Conv2d(len(group), DIM, 8, 8) for group in groups or ()]
        self.embed = nn.ModuleList(each or [nn.Conv3d(1, DIM, (1, 8, 8), (1, 8, 8))])
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(0.5 * torch.randn(1, 1 + 6 * (channels if groups is None else len(groups)), DIM))
        self.blocks = nn.ModuleList(Block(Packed(sdpa)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.groups is None:
            tokens = self.embed[0](x[:, None]).flatten(2).mT
        else:
            parts = (embed(x[:, list(g)]).flatten(2).mT for embed, g in zip(self.embed, self.groups, strict=True))
            tokens = torch.cat([*parts], 1)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return tokens
