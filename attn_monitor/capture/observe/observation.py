"""Hold what was observed of one attention operation: the requested rows, or the reason why they cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from attn_monitor.capture.observe.attention_rows import (
    AttentionSource,
    Folding,
    JoinedSequences,
    Query,
    Regrouped,
    Sequences,
    regroup,
)
from attn_monitor.capture.observe.checked_rows import CheckedRows

SiteKey = tuple[str, int]
"""The location of an attention: module path, and the number of earlier attentions in it within the same forward."""


@dataclass(frozen=True, kw_only=True)
class _Operation:
    """Describe an attention operation; ``scope`` is the path of the innermost module around all of it."""

    op: str
    batch: int
    heads: int
    queries: int
    keys: int
    scope: str = ""


@dataclass(frozen=True, kw_only=True)
class RefusedObservation(_Operation):
    """Hold the reason why an operation's rows cannot be read."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ObservedRows(_Operation):
    """Hold the requested rows and their checks.

    The checks stay on the device until `verification.fetch_checks`, to avoid a synchronisation.

    Attributes:
        rows: (B, H, K) float32, or float64 for float64.
        error: Largest relative difference between row·V and the model's output, for a mean over queries that of every
            row in it; None if not compared.
        tolerance: The largest error that counts as agreement, for ``error_of_all`` too.
        error_of_all: The same for the rows that statistics over many queries use; None if there are none.
        mixed: Whether the applied weights differ from the softmax (talking heads, gates); None for fused operations.
    """

    rows: Tensor
    error: Tensor | None = None
    tolerance: float = 0.0
    error_of_all: Tensor | None = None
    mixed: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ReadObservation(ObservedRows):
    """Hold rows together with V, the output and the attention itself; use it while the attention runs."""

    values: Tensor  # (B, H, K, D)
    output: Tensor | None  # (B, H, Q, D); None to skip the comparison
    source: AttentionSource

    @property
    def checked_rows(self) -> CheckedRows:
        """Return a reader for the rows of any query that compares them with the output."""
        return CheckedRows(self.source, self.values, self.output)

    def regrouped(self, images: int, folding: Folding | None) -> ReadObservation:
        """Return the observation with batch and heads regrouped for this many images; unchanged if folding is None."""
        if folding is None:
            return self
        if isinstance(folding, Sequences):
            return self._joined(images, folding)
        return replace(
            self,
            batch=images,
            heads=self.batch * self.heads // images,
            rows=regroup(self.rows, images, folding),
            values=regroup(self.values, images, folding),
            output=None if self.output is None else regroup(self.output, images, folding),
            source=Regrouped(self.source, images, folding),
        )

    def _joined(self, images: int, sequences: Sequences) -> ReadObservation:
        """Return the observation of all sequences together; its row is that of the first query."""
        source = JoinedSequences(self.source, sequences.count, self.queries)
        return replace(
            self,
            batch=images,
            queries=sequences.count * self.queries,
            keys=sequences.count * self.keys,
            rows=source.row(0),
            values=regroup(self.values, images, sequences),
            output=None if self.output is None else regroup(self.output, images, sequences),
            source=source,
        )

    def of_query(self, query: Query) -> ReadObservation:
        """Return the observation with the row of another query."""
        checked = self.checked_rows
        return replace(self, rows=checked.read(query), error=checked.error)

    def rows_alone(self) -> ObservedRows:
        """Return the rows and checks without the model's own tensors, which it would keep alive."""
        return ObservedRows(**{f.name: getattr(self, f.name) for f in fields(ObservedRows)})


Observation = ReadObservation | RefusedObservation
