"""Check observed rows: whether they are finite, whether they reproduce the model's output, and their kind."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from attn_monitor.attention import RowKind
from attn_monitor.capture.observe.observation import ObservedRows
from attn_monitor.errors import VerificationError


@dataclass(frozen=True)
class CheckResult:
    """Hold the checks of one observation as plain values."""

    finite: bool
    error: float  # NaN if not compared
    tolerance: float
    mixed: bool
    kind: RowKind
    error_of_all: float  # of the rows that statistics over many queries use; NaN if not compared

    @property
    def reproduces_output(self) -> bool:
        """Return whether row·V equals the model's own output within the tolerance; True if not compared."""
        return not self.error > self.tolerance

    @property
    def all_reproduce_output(self) -> bool:
        """Return whether the rows behind statistics over many queries reproduce the output; True if not compared."""
        return not self.error_of_all > self.tolerance


def fetch_checks(observations: Sequence[ObservedRows]) -> list[CheckResult]:
    """Fetch the checks of all observations from the device in one transfer."""
    facts = []
    for seen in observations:
        unknown = seen.rows.new_full((), math.nan)
        known = (seen.error, seen.mixed, seen.error_of_all)
        facts += [seen.rows.isfinite().all(), *(unknown if f is None else f for f in known)]
        explicit = seen.mixed is not None  # fused operations always apply a softmax
        facts += [seen.rows.amin(), (seen.rows.sum(-1) - 1).abs().amax()] if explicit else [unknown, unknown]
    numbers = torch.stack([f.float() for f in facts]).tolist() if facts else []
    return [_check_result(seen.tolerance, *numbers[6 * i : 6 * i + 6]) for i, seen in enumerate(observations)]


def _check_result(
    tolerance: float, finite: float, error: float, mixed: float, error_of_all: float, lowest: float, off_sum: float
) -> CheckResult:
    kind: RowKind = "signed" if lowest < -1e-6 else "weights" if off_sum > 0.02 else "distribution"
    return CheckResult(finite == 1, error, tolerance, mixed == 1, kind, error_of_all)


def mismatch(layer: str, check: CheckResult) -> VerificationError:
    """Return the error for rows that do not reproduce the model's output."""
    return VerificationError(
        f"{layer}: the attention row times V differs from the model's own output by {check.error:.2g} "
        f"(allowed: {check.tolerance:.2g}), so the row is not what the model computed and no map is shown. Please "
        "report the model; forward= or another layer may help meanwhile"
    )


def no_statistics(layer: str, check: CheckResult, absent: Collection[str]) -> str:
    """Return why a layer has a map but no statistics over many queries."""
    return (
        f"{layer}: the rows of other queries times V differ from the model's own output by {check.error_of_all:.2g} "
        f"(allowed: {check.tolerance:.2g}), so what is made of them is absent ({', '.join(sorted(absent))}). The row "
        "that is shown agrees with the output; ask for single rows by query="
    )
