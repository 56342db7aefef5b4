"""Health flags: states of attention that a trainer wants to be told of, each once, with thresholds to set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.measure.logit_growth import LogitGrowth
from attn_monitor.measure.metrics import LARGEST, Measured
from attn_monitor.measurements import HealthFlag

LEFT = 0.01  # change of a head's entropy that counts as having left its start
FEW = 4.0  # times uniform: less is no peak, as on four patches a quarter is uniform


@dataclass(frozen=True)
class HealthLimits:
    """When a flag is raised.

    ``low_entropy`` and ``high_entropy``: a head beyond these in ``snapshots`` snapshots in a row, after it had left
    its first value, and above the high one for at least ``steps`` optimizer steps, as snapshots may follow one another
    quickly. That a near-uniform head is dead is a rule of thumb of this package; low entropy goes with instability,
    see Zhai et al. 2023, arXiv 2303.06296. ``peak``: a patch with more than this share of the attention on patches,
    and more than four times the uniform one, on most images. ``divergence_growth``: student-teacher divergence so many
    times that of the snapshot before, where that was ``divergence_floor`` already: student and teacher start as equals,
    and part quickly while the learning rate warms up. ``logit``: a layer's largest attention logit that has doubled
    since its first value, and is beyond this or will soon be, see `LogitGrowth`; infinity for never. NaN or infinity
    always raises a flag.

    ``wiring``: whether to look at how student and teacher are wired, see `measure.wiring`; ``still_steps``: after how
    many optimizer steps from the first snapshot it is told that one of them has never moved.
    """

    low_entropy: float = 0.05
    high_entropy: float = 0.995
    snapshots: int = 3
    steps: int = 5
    peak: float = 0.25
    divergence_growth: float = 10.0
    divergence_floor: float = 0.02
    logit: float = 100.0
    wiring: bool = True
    still_steps: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.low_entropy < self.high_entropy <= 1:
            raise ValueError(
                f"health: low_entropy={self.low_entropy}, high_entropy={self.high_entropy}; expected "
                "0 <= low_entropy < high_entropy <= 1"
            )
        if not self.logit > 0:
            raise ValueError(f"health: logit={self.logit}; expected a logit above 0, such as 100, or infinity")
        if self.steps < 0:
            raise ValueError(f"health: steps={self.steps}; expected at least 0")
        if self.snapshots < 1 or not 0 < self.peak <= 1 or self.divergence_growth <= 1:
            raise ValueError(
                f"health: snapshots={self.snapshots}, peak={self.peak}, divergence_growth={self.divergence_growth}; "
                "expected at least 1, a share above 0 and up to 1, and a factor above 1"
            )
        if self.still_steps < 1:
            raise ValueError(f"health: still_steps={self.still_steps}; expected at least 1")


@dataclass
class _Layer:
    """What is remembered of one role's layer from snapshot to snapshot."""

    start: list[float] = field(default_factory=list)  # entropy of each head at the first snapshot
    left: list[bool] = field(default_factory=list)
    low: list[int] = field(default_factory=list)  # snapshots in a row
    high: list[int] = field(default_factory=list)
    since: list[int] = field(default_factory=list)  # step of the last snapshot that was not high
    divergence: float = 0.0
    logit: LogitGrowth = field(default_factory=LogitGrowth)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> _Layer:
        """The layer that `asdict` stored."""
        return cls(**{**state, "logit": LogitGrowth(**state["logit"])})


class Health:
    """Looks at each snapshot in turn; ``flags`` are all that were raised so far, one for a kind, role and layer."""

    def __init__(self, limits: HealthLimits) -> None:
        self.limits = limits
        self.flags: list[HealthFlag] = []
        self._layers: dict[str, _Layer] = {}

    def examine(
        self, step: int, layers: Mapping[tuple[str, int], LayerAttention], measured: Measured
    ) -> tuple[HealthFlag, ...]:
        """Flags that this snapshot raises for the first time. Metrics that were not measured raise none."""
        found = []
        for (role, index), attention in layers.items():
            layer = self._layers.setdefault(f"{role}/{index}", _Layer())
            for kind, heads, value, text in self._findings(layer, step, attention, measured[role, index]):
                known = value if math.isfinite(value) else None
                found.append(HealthFlag(kind, role, index, tuple(heads), step, known, text))
        return self.add(found)

    def add(self, flags: Sequence[HealthFlag]) -> tuple[HealthFlag, ...]:
        """Remember flags; returns those of a kind, role and layer that had none yet."""
        news = self.unknown(flags)
        self.flags += news
        return news

    def unknown(self, flags: Sequence[HealthFlag]) -> tuple[HealthFlag, ...]:
        """Flags of a kind, role and layer that had none yet."""
        raised = {(f.kind, f.role, f.layer) for f in self.flags}
        return tuple(f for f in flags if (f.kind, f.role, f.layer) not in raised)

    def state_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "flags": [f.state_dict() for f in self.flags],
            "layers": {key: asdict(layer) for key, layer in self._layers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: flags raised before are not raised again."""
        self.flags = [HealthFlag.from_state_dict(f) for f in state["flags"]]
        self._layers = {key: _Layer.from_state_dict(layer) for key, layer in state["layers"].items()}

    def _findings(
        self, layer: _Layer, step: int, attention: LayerAttention, values: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Sequence[int], float, str]]:
        """(kind, heads, worst value, text) of everything that is beyond a limit now."""
        broken = (~attention.rows.isfinite()).any(-1).any(0)  # (H,)
        if broken.any():
            yield "nan", _heads(broken), math.nan, "attention holds NaN or infinity; its maps are shown as missing"
        if "entropy" in values:
            yield from self._entropy(layer, step, values["entropy"].mean(0))
        if "peak" in values:
            yield from self._peak(values["peak"], attention.grid[0] * attention.grid[1])
        if "student_teacher_divergence" in values:
            yield from self._divergence(layer, float(values["student_teacher_divergence"].mean()))
        for metric in LARGEST:
            if metric in values:
                of = " of the CLS query" if metric == "max_logit_cls" else ""
                yield from self._logit(layer, step, values[metric].amax(0), of)
                break

    def _entropy(self, layer: _Layer, step: int, entropy: Tensor) -> Iterator[tuple[str, Sequence[int], float, str]]:
        limits, now = self.limits, entropy.tolist()
        if len(layer.start) != len(now):
            layer.start, layer.left = now, [False] * len(now)
            layer.low, layer.high, layer.since = [0] * len(now), [0] * len(now), [step] * len(now)
        for head, value in enumerate(now):
            layer.left[head] |= abs(value - layer.start[head]) > LEFT
            layer.low[head] = layer.low[head] + 1 if layer.left[head] and value < limits.low_entropy else 0
            layer.high[head] = layer.high[head] + 1 if layer.left[head] and value > limits.high_entropy else 0
            layer.since[head] = layer.since[head] if layer.high[head] else step
        low, high = (torch.tensor(n) >= limits.snapshots for n in (layer.low, layer.high))
        high &= step - torch.tensor(layer.since) >= limits.steps
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
        limit = max(self.limits.peak, FEW / patches)
        beyond = (share > limit).float().mean(0) > 0.5
        if beyond.any():
            worst = float(share[:, beyond].mean(0).max())
            text = f"one patch takes {worst:.0%} of the attention on most images, more than {limit:.0%}"
            yield "peak", _heads(beyond), worst, text

    def _logit(
        self, layer: _Layer, step: int, logits: Tensor, of: str
    ) -> Iterator[tuple[str, Sequence[int], float, str]]:
        worst = int(logits.argmax())  # NaN counts as the largest
        layer.logit.add(step, float(logits[worst]))
        text = layer.logit.finding(self.limits.logit, of)
        if text is not None:
            yield "max_logit", [worst], float(logits[worst]), text

    def _divergence(self, layer: _Layer, now: float) -> Iterator[tuple[str, Sequence[int], float, str]]:
        before, layer.divergence = layer.divergence, now
        if before >= self.limits.divergence_floor and now >= self.limits.divergence_growth * before:
            text = f"student-teacher divergence grew {now / before:.0f} times since the snapshot before, to {now:.3f}"
            yield "student_teacher_divergence", (), now, text


def _heads(mask: Tensor) -> list[int]:
    return [int(h) for h in mask.nonzero().flatten()]
