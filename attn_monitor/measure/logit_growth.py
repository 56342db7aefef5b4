"""The growth of a layer's largest attention logit, and the step at which it would cross a limit at this rate.

Logits that grow without bound precede divergence: attention becomes one-hot, and its gradients useless. Sources:
Dehghani et al. 2023 (ViT-22B), arXiv 2302.05442; Wortsman et al. 2023, arXiv 2309.14322; Kimi K2 (arXiv 2507.20534)
clips at 100.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

LARGEST_FLOAT16 = 65_504.0
WINDOW = 5  # snapshots from which the rate is estimated
HORIZON = 1.0  # in windows: a limit that would be crossed later is not reported
SMALLEST_BASE = 0.01  # logits below this are no base for a growth factor: zero-initialised weights start at 0
NEAR = 1 / 3  # share of the limit from which on a growing logit is reported before it reaches it


@dataclass
class LogitGrowth:
    """The largest logit of one layer over a run: its first value, and its latest (step, value) pairs."""

    first: float | None = None
    recent: list[list[float]] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Append a snapshot's value; one that is not finite restarts the window."""
        self.recent = [*self.recent, [step, value]][-WINDOW:] if math.isfinite(value) else []
        self.first = value if self.first is None and math.isfinite(value) else self.first

    def finding(self, limit: float, of: str = "") -> str | None:
        """Describe a logit that has at least doubled and is above the limit, or soon will be; None otherwise.

        Args:
            limit: Logit to stay below.
            of: Text that names the query, such as " of the CLS query"; empty for all queries.
        """
        if self.first is None or not self.recent:
            return None
        (step, now), start = self.recent[-1], max(self.first, 1.0)
        if now < 2 * start or now < max(v for _, v in self.recent):
            return None
        crossings = dict(self._crossings((limit, LARGEST_FLOAT16)))
        span = step - self.recent[0][0]
        if now < limit and not (now >= NEAR * limit and crossings.get(limit, math.inf) <= step + HORIZON * span):
            return None
        text = f"largest attention logit{of} {now:,.0f}{self._grown()}"
        ahead = [f"{value:,.0f} at step {at:,.0f}" for value, at in crossings.items()]
        beyond = f", above {limit:,.0f}" if now >= limit else ""
        return f"{text}{beyond}" + (f"; at this rate it passes {' and '.join(ahead)}" if ahead else "")

    def _grown(self) -> str:
        """Describe the growth within the window; empty after a single snapshot."""
        (step, now), (since, then) = self.recent[-1], self.recent[0]
        if step == since:
            return ""
        before = f"{step - since:,.0f} steps before"
        return (
            f", {now / then:.1f} times that of {before}" if then >= SMALLEST_BASE else f", up from {then:.3g} {before}"
        )

    def _crossings(self, limits: Sequence[float]) -> Iterator[tuple[float, float]]:
        """Yield (limit, step) for each limit ahead, along the least-squares slope of the logarithm of the logit."""
        points = [(s, math.log(v)) for s, v in self.recent if v > 0]
        if len({s for s, _ in points}) < 3:
            return
        mean_step, mean_log = (sum(values) / len(points) for values in zip(*points, strict=True))
        slope = sum((s - mean_step) * (v - mean_log) for s, v in points) / sum((s - mean_step) ** 2 for s, _ in points)
        step, now = self.recent[-1]
        for limit in limits:
            if slope > 0 and now < limit:
                yield limit, step + (math.log(limit) - math.log(now)) / slope
