"""Sketch tokens by random projections of their channels, which keep distances, to compare them between images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SIZE = 16  # numbers in the sketch of one token
FINE = 64  # numbers where changes are compared in their direction too: the error falls with the square root
_SAMPLE = 8192  # numbers from which the precision of a tensor is estimated


def sketch(x: Tensor, size: int = SIZE) -> Tensor:
    """Sketch the tokens of (B, H, T, D), all heads together, as (B, T, S)."""
    return project(x.transpose(1, 2).flatten(2), size)


def project(x: Tensor, size: int = SIZE) -> Tensor:
    """Project (..., D) to (..., S) float32, which nearly keeps distances and proportions."""
    return x.float() @ random_matrix(x.shape[-1], size, x.float())


def off_device(x: Tensor) -> Tensor:
    """Move a tensor to the host, as sketches of all images must not take device memory from the model."""
    return x.cpu()


def random_matrix(rows: int, cols: int, like: Tensor) -> Tensor:
    """Return a fixed random (rows, cols) projection, with the dtype and device of ``like``."""
    return noise_like((rows, cols), like) / math.sqrt(rows)


def noise_like(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return fixed standard normal noise, with the dtype and device of ``like``."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(7), device="cpu").to(like)


def relative_change(sketches: Tensor, reference: Tensor) -> Tensor:
    """Return the (..., T) distances of (..., T, S) sketches, relative to the larger of the two norms."""
    difference = (sketches - reference).norm(dim=-1)
    size = torch.maximum(sketches.norm(dim=-1), reference.norm(dim=-1))
    return torch.where(difference > 0, difference / size.clamp_min(1e-30), 0).nan_to_num(math.inf, math.inf, math.inf)


def change_threshold(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative change above which a token counts as changed."""
    rounding = 4e-3 if device.type == "cuda" and dtype == torch.float32 else 1e-3  # products may run in TF32
    return max(rounding, 8 * torch.finfo(dtype).eps)


def precision_of(x: Tensor) -> torch.dtype:
    """Estimate the precision of a tensor's numbers: half precision if float32 numbers were rounded to it (bf16 RoPE).

    Up to a common factor, such numbers share a few mantissas among many values.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return x.dtype
    numbers = x.detach().flatten()
    sample = numbers[:: numbers.numel() // _SAMPLE | 1].abs()  # an odd step passes through all channels
    halves = ((torch.bfloat16, 128), (torch.float16, 1024))  # each with its number of mantissas, without that of 0
    mantissa = torch.frexp(sample).mantissa
    if mantissa[: _SAMPLE // 4].unique().numel() > halves[-1][1] + 1:  # full precision shows in a part of them
        return x.dtype
    values, mantissas = (int(t.unique().numel()) for t in (sample, mantissa))
    return next((half for half, most in halves if mantissas <= most + 1 and values >= 2 * mantissas), x.dtype)


def coarsest(*precisions: torch.dtype) -> torch.dtype:
    """Return the precision with the largest rounding error."""
    return max(precisions, key=lambda dtype: torch.finfo(dtype).eps)
