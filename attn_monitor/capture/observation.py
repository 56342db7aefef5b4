"""What was observed of one attention operation: the rows that were asked for, or the reason why there are none."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from attn_monitor.capture.attention_rows import AttentionSource, CallingConvention, Folding, Regrouped, regroup
from attn_monitor.capture.checked_rows import CheckedRows

SiteKey = tuple[str, int]
"""Where attention ran: path of the module, and how many attentions had run in it before within the same forward."""


@dataclass(frozen=True, kw_only=True)
class _Operation:
    """Name and shape of an attention operation; ``scope`` is the path of the innermost module around all of it."""

    op: str
    batch: int
    heads: int
    queries: int
    keys: int
    scope: str = ""


@dataclass(frozen=True, kw_only=True)
class RefusedObservation(_Operation):
    """An operation of which no row can be read."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ObservedRows(_Operation):
    """The rows that were asked for, and what they are checked by.

    Of a mean over queries, each of its rows is. ``error_of_all``, with the same ``tolerance``, is that of the rows that
    statistics over many queries are made of, None where there are none.
    ``error`` is the largest relative difference between row·V and what the model computed, None where they were not
    compared. ``mixed`` marks weights that are not applied as a softmax gave them (talking heads, gated mixes), None for
    fused operations. Both stay on the device until `verification.fetch_checks`, so that no GPU waits for them.
    """

    rows: Tensor  # (B, H, K) float32, float64 for float64
    error: Tensor | None = None
    tolerance: float = 0.0
    error_of_all: Tensor | None = None
    mixed: Tensor | None = None
    convention: CallingConvention | None = None  # of an operation from outside PyTorch


@dataclass(frozen=True, kw_only=True)
class ReadObservation(ObservedRows):
    """Rows, with the values that they weight and the attention that they were read from: to be used as it runs."""

    values: Tensor  # (B, H, K, D)
    output: Tensor | None  # (B, H, Q, D), what the operation computed; None where it is not to be compared
    source: AttentionSource

    @property
    def checked_rows(self) -> CheckedRows:
        """The rows of any of its queries, compared with its output as they are read."""
        return CheckedRows(self.source, self.values, self.output)

    def regrouped(self, images: int, folding: Folding | None) -> ReadObservation:
        """The same, read with batch and heads in another order; None leaves it as it is."""
        if folding is None:
            return self
        return replace(
            self,
            batch=images,
            heads=self.batch * self.heads // images,
            rows=regroup(self.rows, images, folding),
            values=regroup(self.values, images, folding),
            output=None if self.output is None else regroup(self.output, images, folding),
            source=Regrouped(self.source, images, folding),
        )

    def rows_alone(self) -> ObservedRows:
        """Without the model's own tensors, which would be kept alive."""
        return ObservedRows(**{f.name: getattr(self, f.name) for f in fields(ObservedRows)})


Observation = ReadObservation | RefusedObservation
