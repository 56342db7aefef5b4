"""How far row·V is from the model's own output, and how far it may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Relative to what the output's own precision allows: sums of |row|·|V|, see `relative_error`.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 8e-3}


def relative_error(rows: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """Largest |row·V - output| of (B, H, Q, K) rows over the largest sum of |row|·|V| of its query and channel.

    ``values`` are (B, H, K, D), in the rows' type; the result is 0 exact, ~1 unrelated. The denominator is the bound
    that floating-point summation itself obeys, so the tolerance only depends on the precision of the (B, H, Q, D)
    output and not on the number of tokens.
    """
    expected, bound = rows @ values, (rows.abs() @ values.abs()).amax((0, 1))  # (Q, D)
    error = (expected - output).abs().amax((0, 1)) / bound.clamp_min(torch.finfo(rows.dtype).tiny)
    return error.max().nan_to_num(nan=math.inf)  # NaN is no agreement


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
