"""Health flags: warnings about states of attention that often precede a failed training, each raised once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.errors import ArgumentError
from attn_monitor.measure.logit_growth import LogitGrowth
from attn_monitor.measure.metrics import LARGEST, Measured
from attn_monitor.measurements import HealthFlag

LEFT = 0.01  # change of a head's entropy from which on it has left its initial value
SWITCHES = ("check_ema", "verdict")  # the limits that are True or False
LEAST_PEAK = 4.0  # times the uniform share: on four patches a quarter is uniform


@dataclass(frozen=True)
class HealthLimits:
    """Thresholds of the health flags. NaN or infinity in attention raises a flag whatever they are.

    Args:
        low_entropy: Flag a head whose normalised entropy, 0 to 1, is below this in ``snapshots`` consecutive snapshots,
            after it had left its initial value. Low entropy goes with instability: Zhai et al. 2023, arXiv 2303.06296.
        high_entropy: Flag a head whose entropy is above this likewise, and for at least ``steps`` optimizer steps. That
            such a head is dead is a rule of thumb of this package.
        snapshots: Number of consecutive snapshots, at least 1.
        steps: Number of optimizer steps, at least 0: snapshots may follow one another quickly.
        peak: Flag a head that puts more than this share of its patch attention, 0 to 1, on one patch of most images, if
            that is more than four times the uniform share.
        divergence_growth: Flag a student-teacher divergence of at least this many times that of the previous snapshot,
            if that was at least ``divergence_floor``: student and teacher start as equals, and diverge quickly while
            the learning rate warms up.
        divergence_floor: Smallest previous divergence, 0 to 1, to compare with.
        logit: Flag a layer whose largest attention logit has doubled since its first value and is above this or soon
            will be, see `LogitGrowth`; infinity disables the check.
        check_ema: Check how the teacher follows the student, see `measure.ema_checks`.
        verdict: Judge the run at each snapshot, see `measure.verdict`; a verdict that is bad for the first time is a
            flag.
        stall_steps: Flag a student or a teacher that has never changed after this many optimizer steps.

    Raises:
        ArgumentError: A threshold is out of its range.

    Example:
        >>> HealthLimits(peak=0.5).peak
        0.5
        >>> HealthLimits(snapshots=0)
        Traceback (most recent call last):
        attn_monitor.errors.ArgumentError: health: snapshots=0; expected at least 1
    """

    low_entropy: float = 0.05
    high_entropy: float = 0.995
    snapshots: int = 3
    steps: int = 5
    peak: float = 0.25
    divergence_growth: float = 10.0
    divergence_floor: float = 0.02
    logit: float = 100.0
    check_ema: bool = True
    stall_steps: int = 20
    verdict: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in SWITCHES and not isinstance(value, bool):
                raise ArgumentError(f"health: {name}={value!r}; expected True or False")
            if not isinstance(value, Real) or math.isnan(value) or (isinstance(value, bool) and name not in SWITCHES):
                raise ArgumentError(f"health: {name}={value!r}; expected a number")
        if not 0 <= self.low_entropy < self.high_entropy <= 1:
            raise ArgumentError(
                f"health: low_entropy={self.low_entropy}, high_entropy={self.high_entropy}; expected "
                "0 <= low_entropy < high_entropy <= 1"
            )
        if not self.logit > 0:
            raise ArgumentError(f"health: logit={self.logit}; expected a logit above 0, such as 100, or infinity")
        if not 0 < self.peak <= 1:
            raise ArgumentError(f"health: peak={self.peak}; expected a share above 0 and up to 1")
        if not self.divergence_growth > 1:
            raise ArgumentError(f"health: divergence_growth={self.divergence_growth}; expected a factor above 1")
        for name, least in (("steps", 0), ("snapshots", 1), ("stall_steps", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"health: {name}={getattr(self, name)}; expected at least {least}")


@dataclass
class _LayerState:
    """State of one role's layer between snapshots; lists have an item for each head."""

    start: list[float] = field(default_factory=list)  # entropy at the first snapshot
    left: list[bool] = field(default_factory=list)
    low: list[int] = field(default_factory=list)  # consecutive snapshots below the limit
    high: list[int] = field(default_factory=list)  # and above it
    since: list[int] = field(default_factory=list)  # step of the last snapshot that was not high
    divergence: float = 0.0
    logit: LogitGrowth = field(default_factory=LogitGrowth)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> _LayerState:
        """Restore what `asdict` stored."""
        return cls(**{**state, "logit": LogitGrowth(**state["logit"])})


class Health:
    """Raise flags snapshot by snapshot; ``flags`` are all raised so far, at most one per kind, role and layer."""

    def __init__(self, limits: HealthLimits) -> None:
        self.limits = limits
        self.flags: list[HealthFlag] = []
        self._layers: dict[str, _LayerState] = {}

    def examine(
        self, step: int, layers: Mapping[tuple[str, int], LayerAttention], measured: Measured
    ) -> tuple[HealthFlag, ...]:
        """Return the flags that this snapshot is the first to raise.

        Args:
            step: Optimizer step of the snapshot.
            layers: Attention by (role, layer).
            measured: Metric values by (role, layer) and name; a metric that was not measured raises no flag.
        """
        found = []
        for (role, index), attention in layers.items():
            layer = self._layers.setdefault(f"{role}/{index}", _LayerState())
            for kind, heads, value, text in self._findings(layer, step, attention, measured[role, index]):
                known = value if math.isfinite(value) else None
                found.append(HealthFlag(kind, role, index, tuple(heads), step, known, text))
        return self.add(found)

    def add(self, flags: Sequence[HealthFlag]) -> tuple[HealthFlag, ...]:
        """Store the flags whose kind, role and layer had none yet, and return these."""
        raised = {(f.kind, f.role, f.layer) for f in self.flags}
        new = tuple(f for f in flags if (f.kind, f.role, f.layer) not in raised)
        self.flags += new
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values, for a checkpoint."""
        return {
            "flags": [f.state_dict() for f in self.flags],
            "layers": {key: asdict(layer) for key, layer in self._layers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`: its flags are not raised again."""
        self.flags = [HealthFlag.from_state_dict(f) for f in state["flags"]]
        self._layers = {key: _LayerState.from_state_dict(layer) for key, layer in state["layers"].items()}

    def _findings(
        self, layer: _LayerState, step: int, attention: LayerAttention, values: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Sequence[int], float, str]]:
        """Yield (kind, heads, worst value, text) for each limit that is exceeded now."""
        broken = (~attention.rows.isfinite()).any(-1).any(0)  # (H,)
        if broken.any():
            yield "nan", _heads(broken), math.nan, "attention holds NaN or infinity; its maps are shown as missing"
        if "entropy" in values:
            yield from self._entropy(layer, step, values["entropy"].mean(0))
        if "peak" in values:
            yield from self._peak(values["peak"], attention.grid.cells)
        if "student_teacher_divergence" in values:
            yield from self._divergence(layer, float(values["student_teacher_divergence"].mean()))
        for metric in LARGEST:
            if metric in values:
                of = " of the CLS query" if metric == "max_logit_cls" else ""
                yield from self._logit(layer, step, values[metric].amax(0), of)
                break

    def _entropy(
        self, layer: _LayerState, step: int, entropy: Tensor
    ) -> Iterator[tuple[str, Sequence[int], float, str]]:
        limits, now = self.limits, entropy.tolist()
        if len(layer.start) != len(now):
            layer.start, layer.left = now, [False] * len(now)
            layer.low, layer.high, layer.since = [0] * len(now), [0] * len(now), [step] * len(now)
        for head, value in enumerate(now):
            layer.left[head] |= abs(value - layer.start[head]) > LEFT
            layer.low[head] = layer.low[head] + 1 if layer.left[head] and value < limits.low_entropy else 0
            layer.high[head] = layer.high[head] + 1 if layer.left[head] and value > limits.high_entropy else 0
            layer.since[head] = layer.since[head] if layer.high[head] else step
        low, high = (torch.tensor(n, device="cpu") >= limits.snapshots for n in (layer.low, layer.high))
        high &= step - torch.tensor(layer.since, device="cpu") >= limits.steps
        for_long = f"for {limits.snapshots} snapshots"
        if low.any():
            worst = float(entropy[low].min())
            text = f"entropy {worst:.3f}, below {limits.low_entropy} {for_long}: nearly all attention on one patch"
            yield "low_entropy", _heads(low), worst, text
        if high.any():
            worst = float(entropy[high].max())
            text = f"entropy {worst:.4f}, above {limits.high_entropy} {for_long}: uniform again, perhaps a dead head"
            yield "high_entropy", _heads(high), worst, text

    def _peak(self, peak: Tensor, patches: int) -> Iterator[tuple[str, Sequence[int], float, str]]:
        share = peak / patches  # (B, H)
        limit = max(self.limits.peak, LEAST_PEAK / patches)
        beyond = (share > limit).float().mean(0) > 0.5
        if beyond.any():
            worst = float(share[:, beyond].mean(0).max())
            text = f"one patch takes {worst:.0%} of the attention on most images, more than {limit:.0%}"
            yield "peak", _heads(beyond), worst, text

    def _logit(
        self, layer: _LayerState, step: int, logits: Tensor, of: str
    ) -> Iterator[tuple[str, Sequence[int], float, str]]:
        worst = int(logits.argmax())  # NaN counts as the largest
        layer.logit.add(step, float(logits[worst]))
        text = layer.logit.finding(self.limits.logit, of)
        if text is not None:
            yield "max_logit", [worst], float(logits[worst]), text

    def _divergence(self, layer: _LayerState, now: float) -> Iterator[tuple[str, Sequence[int], float, str]]:
        before, layer.divergence = layer.divergence, now
        if before >= self.limits.divergence_floor and now >= self.limits.divergence_growth * before:
            text = f"student-teacher divergence grew {now / before:.0f} times since the previous snapshot, to {now:.3f}"
            yield "student_teacher_divergence", (), now, text


def _heads(mask: Tensor) -> list[int]:
    return [int(h) for h in mask.nonzero().flatten()]
