"""Define what a snapshot holds beside attention: metrics by `MetricKey`, health flags, and a verdict on the run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

HEALTH_TAG = "attn/health_flags"  # the number of health flags that a run has raised so far
TRAINING = "training"  # the role of what belongs to no model, such as the loss

_TAG = re.compile(
    r"attn(?P<heads>_heads)?/(?P<role>.+?)(/layer(?P<layer>[0-9]+))?/(?P<metric>\w+)(?(heads)/head(?P<head>[0-9]+))"
)


class MetricKey(NamedTuple):
    """Identify a value by role, layer, metric and head; head None is the mean over heads and images.

    Layer None is the whole model, as for its global features in training; the loss has the role "training". The metrics
    in `measure.metrics.LARGEST` are the largest value instead of the mean.

    Example:
        >>> MetricKey("teacher", 11, "entropy").tag
        'attn/teacher/layer11/entropy'
        >>> MetricKey.from_tag("attn_heads/teacher/layer11/entropy/head2")
        MetricKey(role='teacher', layer=11, metric='entropy', head=2)
        >>> MetricKey("teacher", None, "rankme").tag
        'attn/teacher/rankme'
    """

    role: str
    layer: int | None
    metric: str
    head: int | None = None

    @property
    def tag(self) -> str:
        """Return the value's name in loggers."""
        where = self.role if self.layer is None else f"{self.role}/layer{self.layer}"
        return (
            f"attn/{where}/{self.metric}" if self.head is None else f"attn_heads/{where}/{self.metric}/head{self.head}"
        )

    @classmethod
    def from_tag(cls, tag: str) -> MetricKey | None:
        """Parse a logger's tag; None if it is not the tag of a metric."""
        found = _TAG.fullmatch(tag)
        if found is None:
            return None
        role, layer, metric, head = found.group("role", "layer", "metric", "head")
        return cls(role, None if layer is None else int(layer), metric, None if head is None else int(head))


class Metrics(dict[MetricKey, float]):
    """Map a `MetricKey`, a tuple as in ``metrics["teacher", 11, "entropy", None]``, or a logger's tag to a value."""

    def __getitem__(self, key: MetricKey | str) -> float:
        return super().__getitem__(_as_key(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_as_key(key))

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of a key or tag, ``default`` if there is none."""
        return super().get(_as_key(key), default)

    def by_layer(self) -> dict[tuple[str, int | None], Metrics]:
        """Group the metrics by (role, layer)."""
        found: dict[tuple[str, int | None], Metrics] = {}
        for key, value in self.items():
            found.setdefault((key.role, key.layer), Metrics())[key] = value
        return found

    def of_layer(self, role: str, layer: int | None) -> dict[str, float]:
        """Return one layer's means over heads and images, by the metric's name; None is the whole model."""
        return {key.metric: value for key, value in self.items() if key[:2] == (role, layer) and key.head is None}


def _as_key(key: Any) -> Any:
    return MetricKey.from_tag(key) if isinstance(key, str) else key


@dataclass(frozen=True)
class HealthFlag:
    """Hold a finding about the attention of a model.

    Args:
        kind: such as "low_entropy", "nan" or "order".
        role: the model's role.
        layer: index of the layer, None for the whole model.
        heads: indices of the heads concerned; empty if it is not about single heads.
        step: optimizer steps done.
        value: the number that raised the flag, of the worst head; None if there is none.
        text: the finding in words.

    Example:
        >>> str(HealthFlag("low_entropy", "teacher", 11, (0, 3), 2000, 0.01, "nearly all attention on one patch"))
        'teacher, layer 11, heads 0, 3: nearly all attention on one patch (step 2,000)'
    """

    kind: str
    role: str
    layer: int | None
    heads: tuple[int, ...]
    step: int
    value: float | None
    text: str

    def __str__(self) -> str:
        which = "head" if len(self.heads) == 1 else "heads"
        heads = f", {which} {', '.join(map(str, self.heads))}" if self.heads else ""
        return f"{self.where}{heads}: {self.text} (step {self.step:,})"

    @property
    def where(self) -> str:
        """Return the role, and the layer if there is one, in words."""
        return self.role if self.layer is None else f"{self.role}, layer {self.layer}"

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and checkpoints."""
        return {**asdict(self), "heads": list(self.heads)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> HealthFlag:
        """Restore a flag from its `state_dict`."""
        return cls(**{**{f.name: state[f.name] for f in fields(cls)}, "heads": tuple(state["heads"])})


State = Literal[
    "no verdict yet",
    "healthy",
    "complete collapse",
    "dimensional collapse",
    "prototype collapse",
    "attention collapsed",
    "dense features decaying",  # in archives of before; only noted now
    "diverging",
]
"""What a verdict says of a run."""

STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Verdict:
    """What has become of a run so far.

    Args:
        state: such as "healthy" or "complete collapse".
        since: first step of the snapshots that agree on it; None if healthy, or without a verdict.
        evidence: what speaks for it, in words.
        advice: what people do about it.

    Example:
        >>> str(Verdict("healthy"))
        'healthy'
    """

    state: State
    since: int | None = None
    evidence: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        since = "" if self.since is None else f" since step {self.since:,}"
        because = f": {'; '.join(self.evidence)}" if self.evidence else ""
        return f"{self.state}{since}{because}" + (f". {self.advice}" if self.advice else "")

    @property
    def is_bad(self) -> bool:
        """Whether something is wrong."""
        return self.state not in ("healthy", "no verdict yet")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "evidence": list(self.evidence)}

    def flag(self, step: int) -> HealthFlag:
        """Return a bad verdict as a health flag."""
        return HealthFlag(self.state.replace(" ", "_"), TRAINING, None, (), step, None, str(self))


def finite_or_none(value: float) -> float | None:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return value if math.isfinite(value) else None
