"""`RunHistory`: the metrics of a run that its verdict is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from attn_monitor.measurements import MetricKey

OF_MODEL = (
    *("loss", "prototypes", "prototypes_alike", "assignment_entropy_mean", "assignment_entropy_each"),
    *("mean_cosine", "effective_rank", "feature_samples"),
)
OF_LAYER = ("entropy", "dense_separability", "cls_patch_cosine")


class Point(NamedTuple):
    """A value at a step."""

    step: int
    value: float


@dataclass
class RunHistory:
    """The metrics of a run that a verdict is made of: values by step, by (role, metric); of layers the last counts."""

    values: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)

    def add(self, step: int, metrics: Mapping[MetricKey, float]) -> None:
        """Append a snapshot's values; drop those of later steps, from before a run was resumed."""
        self.values = {key: {s: v for s, v in line.items() if s < step} for key, line in self.values.items()}
        self.complete(step, metrics)

    def complete(self, step: int, metrics: Mapping[MetricKey, float]) -> None:
        """Add values of a snapshot that were computed after it."""
        last: dict[str, int] = {}
        for key in metrics:
            if key.layer is not None:
                last[key.role] = max(key.layer, last.get(key.role, 0))
        for key, value in metrics.items():
            read = OF_MODEL if key.layer is None else OF_LAYER if key.layer == last[key.role] else ()
            if key.head is None and key.metric in read:
                self.values.setdefault((key.role, key.metric), {})[step] = float(value)

    def of(self, metric: str, role: str = "") -> list[Point]:
        """Return the points of a metric in order of steps, of this role if it has some, else of the first that has."""
        known = [who for who, name in self.values if name == metric]
        role = role if role in known or not known else known[0]
        return [Point(*point) for point in sorted(self.values.get((role, metric), {}).items())]

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is watched."""
        return any(role.endswith("teacher") for role, _ in self.values)

    @property
    def last_step(self) -> int:
        """Return the step of the latest snapshot, -1 without any."""
        return max((step for line in self.values.values() for step in line), default=-1)

    def state_dict(self) -> list[Any]:
        """Return plain values, for a checkpoint."""
        return [[*key, [list(point) for point in line.items()]] for key, line in self.values.items()]

    @classmethod
    def from_state_dict(cls, state: Sequence[Any]) -> RunHistory:
        """Restore a history from `state_dict`."""
        return cls({(role, metric): {int(s): float(v) for s, v in line} for role, metric, line in state})
