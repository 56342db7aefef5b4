"""The checks of observed rows: are they finite, do they give the model's own output, and what kind of rows are they."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.attention import RowKind
from attn_monitor.capture.observation import ObservedRows
from attn_monitor.capture.rows import widen
from attn_monitor.errors import VerificationError

# Relative to what the output's own precision allows: sums of |row|·|V|, see `relative_error`.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 8e-3}


def relative_error(rows: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """Largest |row·V - output| over the largest sum of |row|·|V| of its channel: 0 exact, ~1 unrelated.

    The denominator is the bound that floating-point summation itself obeys, so the tolerance only depends on the
    precision of the output and not on the number of tokens.
    """
    values = widen(values).to(rows.dtype)
    if values.shape[1] != rows.shape[1]:
        values = values.repeat_interleave(rows.shape[1] // values.shape[1], 1)
    expected = (rows[:, :, None] @ values)[:, :, 0]  # (B, H, D)
    bound = (rows[:, :, None].abs() @ values.abs())[:, :, 0].amax((0, 1))  # (D,)
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


@dataclass(frozen=True)
class CheckResult:
    """The checks of one observation as plain values."""

    finite: bool
    error: float  # NaN: not compared
    tolerance: float
    mixed: bool
    kind: RowKind

    @property
    def reproduces_output(self) -> bool:
        """Whether row·V is the model's own output, as far as that was compared."""
        return not self.error > self.tolerance


def fetch_checks(observations: Sequence[ObservedRows]) -> list[CheckResult]:
    """Bring the checks of all observations from the device in one transfer."""
    facts = []
    for seen in observations:
        unknown = seen.rows.new_full((), math.nan)
        facts += [seen.rows.isfinite().all(), *(unknown if f is None else f for f in (seen.error, seen.mixed))]
        explicit = seen.mixed is not None  # what a fused operation applies is a softmax
        facts += [seen.rows.amin(), (seen.rows.sum(-1) - 1).abs().amax()] if explicit else [unknown, unknown]
    numbers = torch.stack([f.float() for f in facts]).tolist() if facts else []
    return [_check_result(seen.tolerance, *numbers[5 * i : 5 * i + 5]) for i, seen in enumerate(observations)]


def _check_result(
    tolerance: float, finite: float, error: float, mixed: float, lowest: float, off_sum: float
) -> CheckResult:
    kind: RowKind = "signed" if lowest < -1e-6 else "weights" if off_sum > 0.02 else "distribution"
    return CheckResult(finite == 1, error, tolerance, mixed == 1, kind)


def mismatch(layer: str, check: CheckResult) -> VerificationError:
    """The refusal of rows that do not reproduce the model's output."""
    return VerificationError(
        f"{layer}: the attention row times V differs from the model's own output by {check.error:.2g} "
        f"(allowed: {check.tolerance:.2g}), so the row is not what the model computed and no map is shown. Please "
        "report the model; forward= or another layer may help meanwhile"
    )
