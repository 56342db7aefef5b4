"""Everything that one run measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.asking import Asking
from benchmarks.long_run import LongRun
from benchmarks.measure import Spread
from benchmarks.memory import Memory
from benchmarks.pictures import Pictures
from benchmarks.player import Player
from benchmarks.scaling import Growth
from benchmarks.speed import Table
from benchmarks.startup import Startup
from benchmarks.suite import SuiteRun
from benchmarks.training import Training


@dataclass
class Results:
    """One run; what was not measured is None or empty. ``loads`` are the machine's before and after."""

    machine: dict[str, Any]
    quick: bool
    left_out: dict[str, str]
    speed: list[Table] = field(default_factory=list)
    memory: Memory | None = None
    pictures: Pictures | None = None
    player: Player | None = None
    long_run: LongRun | None = None
    training: Training | None = None
    growth: list[Growth] = field(default_factory=list)
    metrics: Spread | None = None
    watched_step: Spread | None = None
    dense: Spread | None = None
    startup: Startup | None = None
    asking: Asking | None = None
    suite: list[SuiteRun] = field(default_factory=list)
    minutes: float = 0.0
    loads: tuple[float, float] = (0.0, 0.0)

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
