"""The growth of a layer's largest attention logit, and when it would cross a line at this rate.

Logits that grow without end go before divergence: attention becomes one-hot, and its gradients useless. Sources:
Dehghani et al. 2023 (ViT-22B), arXiv 2302.05442; Wortsman et al. 2023, arXiv 2309.14322; Kimi K2 (arXiv 2507.20534)
clips at 100.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

LARGEST_FLOAT16 = 65_504.0
WINDOW = 5  # snapshots that the rate is taken from
AHEAD = 1.0  # windows: a line that would be crossed later is no news
TOLD = 0.01  # a logit from which on growth is told as a factor: weights of zeros start at 0, and others below it
NEAR = 1 / 3  # of the line, from where on it counts as being headed for


@dataclass
class LogitGrowth:
    """What is remembered of one layer's largest logit: its first value, and the latest (step, value)."""

    first: float | None = None
    recent: list[list[float]] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """One more snapshot; a value that is not a number ends the row."""
        self.recent = [*self.recent, [step, value]][-WINDOW:] if math.isfinite(value) else []
        self.first = value if self.first is None and math.isfinite(value) else self.first

    def finding(self, line: float, of: str = "") -> str | None:
        """In words, where the logit has at least doubled and is beyond the line, or on its way to it; else None.

        ``of`` says whose logit it is, where it is not that of all queries.
        """
        if self.first is None or not self.recent:
            return None
        (step, now), start = self.recent[-1], max(self.first, 1.0)
        if now < 2 * start or now < max(v for _, v in self.recent):
            return None
        crossings = dict(self._crossings((line, LARGEST_FLOAT16)))
        span = step - self.recent[0][0]
        if now < line and not (now >= NEAR * line and crossings.get(line, math.inf) <= step + AHEAD * span):
            return None
        text = f"largest attention logit{of} {now:,.0f}{self._grown()}"
        ahead = [f"{value:,.0f} at step {at:,.0f}" for value, at in crossings.items()]
        beyond = f", above {line:,.0f}" if now >= line else ""
        return f"{text}{beyond}" + (f"; at this rate it passes {' and '.join(ahead)}" if ahead else "")

    def _grown(self) -> str:
        """Since when by how much, in words; empty after a single snapshot."""
        (step, now), (since, then) = self.recent[-1], self.recent[0]
        if step == since:
            return ""
        before = f"{step - since:,.0f} steps before"
        return f", {now / then:.1f} times that of {before}" if then >= TOLD else f", up from {then:.3g} {before}"

    def _crossings(self, lines: Sequence[float]) -> Iterator[tuple[float, float]]:
        """(line, step) for each line ahead: the logarithm of the logit goes on along its least-squares slope."""
        points = [(s, math.log(v)) for s, v in self.recent if v > 0]
        if len({s for s, _ in points}) < 3:
            return
        mean_step, mean_log = (sum(values) / len(points) for values in zip(*points, strict=True))
        slope = sum((s - mean_step) * (v - mean_log) for s, v in points) / sum((s - mean_step) ** 2 for s, _ in points)
        step, now = self.recent[-1]
        for line in lines:
            if slope > 0 and now < line:
                yield line, step + (math.log(line) - math.log(now)) / slope
