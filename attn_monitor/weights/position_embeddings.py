"""Position embeddings that were trained on another number of patches, interpolated for a model's own."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_PREFIX_TOKENS = 16  # class, distillation, registers
NAME = re.compile(r"pos(ition(al)?)?_emb")


@dataclass(frozen=True)
class Grids:
    """Rows and columns of patches in a file and in a model, after tokens that have no place in the image."""

    prefix_tokens: int
    old: tuple[int, int]
    new: tuple[int, int]

    def __str__(self) -> str:
        return f"from {self.old[0]} × {self.old[1]} to {self.new[0]} × {self.new[1]} patches"


def find_grids(model: nn.Module, name: str, old: torch.Size, new: torch.Size) -> Grids | None:
    """How embeddings (1, tokens, width) or (tokens, width) of two sizes are laid out; None where they are no such pair.

    Grids are square, unless a module of the model says otherwise by its ``grid_size``.
    """
    same_width = old[:-2] + old[-1:] == new[:-2] + new[-1:]
    if not NAME.search(name) or len(old) not in (2, 3) or not same_width:
        return None
    told = (getattr(module, "grid_size", None) for module in model.modules())
    known = next((size for size in told if isinstance(size, tuple) and len(size) == 2), None)
    for prefix_tokens in range(min(old[-2], new[-2], MOST_PREFIX_TOKENS + 1)):
        before, after = (_square(tokens - prefix_tokens) for tokens in (old[-2], new[-2]))
        if known is not None and math.prod(known) == new[-2] - prefix_tokens:
            after = known
        if before is not None and after is not None:
            return Grids(prefix_tokens, before, after)
    return None


def _square(patches: int) -> tuple[int, int] | None:
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def interpolate(embeddings: Tensor, grids: Grids) -> Tensor:
    """Bicubic with antialiasing, as timm does; the tokens before the patches are kept."""
    before, patches = embeddings[..., : grids.prefix_tokens, :], embeddings[..., grids.prefix_tokens :, :]
    image = patches.float().reshape(1, *grids.old, -1).permute(0, 3, 1, 2)  # (1, width, rows, columns)
    image = F.interpolate(image, size=grids.new, mode="bicubic", antialias=True)
    patches = image.permute(0, 2, 3, 1).reshape(*embeddings.shape[:-2], -1, embeddings.shape[-1])
    return torch.cat([before, patches.to(before.dtype)], dim=-2)
