"""Measure how far row·V is from the model's own output, and define how far it may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_monitor.capture.observe.random_projections import noise_like

# Relative to the sum of |row|·|V|, see `relative_error`.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 8e-3}


def relative_error(row: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """Return the largest |row·V - output|, relative to the largest sum of |row|·|V| of its channel.

    The denominator bounds the error of floating-point summation, so the tolerance depends on the precision of the
    output but not on the number of tokens.

    Args:
        row: (B, H, K).
        values: (B, H, K, D).
        output: (B, H, D).

    Returns:
        A scalar: 0 for an exact match, about 1 for unrelated tensors, infinity for NaN.
    """
    expected = (row[:, :, None] @ values)[:, :, 0]  # (B, H, D)
    bound = (row[:, :, None].abs() @ values.abs())[:, :, 0].amax((0, 1))  # (D,)
    error = (expected - output).abs().amax((0, 1)) / bound.clamp_min(torch.finfo(row.dtype).tiny)
    return error.max().nan_to_num(nan=math.inf)


class ManyRows:
    """Compare many rows with their outputs by a few random sums over channels, much cheaper than row·V.

    A sum with random signs is about as large as the norm of the difference over channels. The bound is the sum of
    |row|·|V|, with |V| the norm over channels.

    Args:
        values: V, (B, H, K, D).
    """

    _SUMS = 4

    def __init__(self, values: Tensor) -> None:
        self._signs = noise_like((values.shape[-1], self._SUMS), values).sign()
        self._sums, self._lengths = values @ self._signs, torch.linalg.vector_norm(values, dim=-1, keepdim=True)

    def relative_error(self, rows: Tensor, output: Tensor) -> Tensor:
        """Return the largest relative error of rows (B, H, Q, K) with outputs (B, H, Q, D), a scalar."""
        difference: Tensor = (rows @ self._sums - output.to(rows.dtype) @ self._signs).abs().amax((0, 1, 3))  # (Q,)
        bound = (rows.abs() @ self._lengths).amax((0, 1, 3))
        largest: Tensor = (difference / bound.clamp_min(torch.finfo(rows.dtype).tiny)).max()
        return largest.nan_to_num(nan=math.inf)


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest relative error that the precision explains; for float32, that of PyTorch's matrix products."""
    if dtype == torch.float32:
        dtype = _precision_of_products(device)
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def _precision_of_products(device: torch.device) -> torch.dtype:
    """Return the precision of float32 matrix products by PyTorch's settings; TF32 has the mantissa of float16."""
    backends = {"cuda": torch.backends.cuda.matmul, "cpu": getattr(torch.backends.mkldnn, "matmul", None)}
    backend = backends.get(device.type)
    setting = getattr(backend, "fp32_precision", None)  # PyTorch 2.9 and newer, for both ways to set it
    if setting is None and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        setting = "tf32"  # reading `allow_tf32` raises if the newer setting was used
    return {"tf32": torch.float16, "bf16": torch.bfloat16}.get(setting or "", torch.float32)
