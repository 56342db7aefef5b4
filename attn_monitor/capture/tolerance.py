"""How far row·V is from the model's own output, and how far it may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_monitor.capture.token_places.random_projections import noise_like

# Relative to what the output's own precision allows: sums of |row|·|V|, see `relative_error`.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 8e-3}


def relative_error(row: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """Largest |row·V - output| over the largest sum of |row|·|V| of its channel: 0 exact, ~1 unrelated.

    Of a row (B, H, K), values (B, H, K, D) and an output (B, H, D). The denominator is the bound that floating-point
    summation itself obeys, so the tolerance depends on the precision of the output and not on the number of tokens.
    """
    expected = (row[:, :, None] @ values)[:, :, 0]  # (B, H, D)
    bound = (row[:, :, None].abs() @ values.abs())[:, :, 0].amax((0, 1))  # (D,)
    error = (expected - output).abs().amax((0, 1)) / bound.clamp_min(torch.finfo(row.dtype).tiny)
    return error.max().nan_to_num(nan=math.inf)  # NaN is no agreement


class ManyRows:
    """The same of many rows, at a fraction of what row·V costs: a few random sums of the channels are compared.

    A sum with random signs is as large as the difference itself, taken over all channels, and the bound is that of the
    lengths: the sum of |row|·|V|, with |V| a vector's length.
    """

    _SUMS = 4

    def __init__(self, values: Tensor) -> None:
        self._signs = noise_like((values.shape[-1], self._SUMS), values).sign()
        self._sums, self._lengths = values @ self._signs, torch.linalg.vector_norm(values, dim=-1, keepdim=True)

    def relative_error(self, rows: Tensor, output: Tensor) -> Tensor:
        """Of rows (B, H, Q, K) and the outputs of their queries (B, H, Q, D): the largest of all queries."""
        difference: Tensor = (rows @ self._sums - output.to(rows.dtype) @ self._signs).abs().amax((0, 1, 3))  # (Q,)
        bound = (rows.abs() @ self._lengths).amax((0, 1, 3))
        largest: Tensor = (difference / bound.clamp_min(torch.finfo(rows.dtype).tiny)).max()
        return largest.nan_to_num(nan=math.inf)


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error that the precision explains, for float32 that in which matrices are multiplied."""
    if dtype == torch.float32:
        dtype = _precision_of_products(device)
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def _precision_of_products(device: torch.device) -> torch.dtype:
    """float32 unless PyTorch was told to multiply float32 matrices in less; TF32 has the mantissa of float16."""
    backends = {"cuda": torch.backends.cuda.matmul, "cpu": getattr(torch.backends.mkldnn, "matmul", None)}
    backend = backends.get(device.type)
    setting = getattr(backend, "fp32_precision", None)  # whichever way it was set; PyTorch 2.9 and newer
    if setting is None and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        setting = "tf32"  # only here, as reading this raises where the newer setting was used
    return {"tf32": torch.float16, "bf16": torch.bfloat16}.get(setting or "", torch.float32)
