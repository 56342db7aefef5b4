"""Sketches of tokens, to be compared between images: a few random projections of the channels keep distances."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SIZE = 16  # numbers that stand for one token's channels
_SAMPLE = 8192  # numbers that tell the precision of a tensor


def sketch(x: Tensor) -> Tensor:
    """(B, T, S) of (B, H, T, D)."""
    return project(x.transpose(1, 2).flatten(2))


def project(x: Tensor) -> Tensor:
    """(..., D) to (..., S) float32, which keeps distances and proportions."""
    return x.float() @ random_matrix(x.shape[-1], SIZE, x.float())


def off_device(x: Tensor) -> Tensor:
    """In the memory of the host, where what is kept of all images takes nothing away from the model."""
    return x.cpu()


def random_matrix(rows: int, cols: int, like: Tensor) -> Tensor:
    """The same (rows, cols) projection every time, in the type and on the device of a tensor."""
    return noise_like((rows, cols), like) / math.sqrt(rows)


def noise_like(shape: Sequence[int], like: Tensor) -> Tensor:
    """The same standard normal noise every time, in the type and on the device of a tensor."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(7)).to(like)


def relative_change(sketches: Tensor, reference: Tensor) -> Tensor:
    """By how much tokens differ, relative to the larger of the two: (..., T) of (..., T, S)."""
    difference = (sketches - reference).norm(dim=-1)
    size = torch.maximum(sketches.norm(dim=-1), reference.norm(dim=-1))
    return torch.where(difference > 0, difference / size.clamp_min(1e-30), 0).nan_to_num(math.inf, math.inf, math.inf)


def change_threshold(dtype: torch.dtype, device: torch.device) -> float:
    """The relative change above which a token counts as changed."""
    rounding = 4e-3 if device.type == "cuda" and dtype == torch.float32 else 1e-3  # products may run in TF32
    return max(rounding, 8 * torch.finfo(dtype).eps)


def precision_of(x: Tensor) -> torch.dtype:
    """The precision that a tensor's numbers have: half where float32 ones were computed or rounded in it (bf16 RoPE).

    Up to a common factor, such numbers share a few mantissas among many values.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return x.dtype
    numbers = x.detach().flatten()
    sample = numbers[:: numbers.numel() // _SAMPLE | 1].abs()  # an odd step passes through all channels
    values, mantissas = (int(t.unique().numel()) for t in (sample, torch.frexp(sample).mantissa))
    halves = ((torch.bfloat16, 128), (torch.float16, 1024))  # with that many mantissas each, and 0
    return next((half for half, most in halves if mantissas <= most + 1 and values >= 2 * mantissas), x.dtype)


def coarsest(*precisions: torch.dtype) -> torch.dtype:
    """That of the fewest digits."""
    return max(precisions, key=lambda dtype: torch.finfo(dtype).eps)
