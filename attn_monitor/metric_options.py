"""`MetricOptions`: what is measured on a snapshot, and how it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attn_monitor.capture.recording_options import Verify, check_verify
from attn_monitor.errors import ArgumentError, check_whole
from attn_monitor.measure.metrics import select_metrics


@dataclass(frozen=True)
class MetricOptions:
    """What is measured on a snapshot, and how it is checked.

    Args:
        names: names of metrics. None is all but "distance", with every query of the last layer only; "all" is all, with
            every query of every layer, which "distance", "max_logit" and "sinks" by name also read.
        gram_step: the first snapshot from this step on is the reference of ``gram_drift``, which needs features; None
            is the first of all.
        training: whether to measure global features, prototypes and the loss in a few of training's own steps before
            each snapshot, see `train.training_watch`.
        verify: whether to check row·V against the model's output: True (every snapshot), "first" (and after changes),
            or False.

    Raises:
        ArgumentError: A value is invalid.

    Example:
        >>> MetricOptions(["drift", "entropy"]).selected
        ('entropy', 'drift')
    """

    names: Sequence[str] | str | None = None
    gram_step: int | None = None
    verify: Verify = True
    training: bool = True

    def __post_init__(self) -> None:
        select_metrics(self.names)
        check_verify(self.verify)
        if not isinstance(self.training, bool):
            raise ArgumentError(f"training={self.training!r}: expected True or False")
        check_whole("gram_step", self.gram_step, 0, "a step of at least 0, or None for the first snapshot")

    @classmethod
    def of(cls, metrics: MetricOptions | Sequence[str] | str | None, *, features: bool = False) -> MetricOptions:
        """Return names of metrics as options, after checking that Gram drift has the features that it needs."""
        options = metrics if isinstance(metrics, MetricOptions) else cls(metrics)
        if not isinstance(features, bool):
            raise ArgumentError(f"features={features!r}: expected True or False")
        if options.gram_step is not None and not features:
            raise ArgumentError(
                f"gram_step={options.gram_step}: features is False, and Gram drift is measured on features=True"
            )
        return options

    @property
    def selected(self) -> tuple[str, ...]:
        """Return the names of the metrics to compute."""
        return select_metrics(self.names)
