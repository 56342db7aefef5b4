"""`RunState`: what watching holds during one run and drops between runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from attn_monitor.background.failures import Failures
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.distributed import RankZero
from attn_monitor.measurements import HealthFlag
from attn_monitor.record.folder_claim import Claim
from attn_monitor.trackers.publisher import Publisher
from attn_monitor.train.backbone_inputs import BackboneInputs
from attn_monitor.train.reports import Cost
from attn_monitor.train.wiring_watch import WiringWatch

HINT = 'on_error="raise" shows the traceback'  # ends the warning of each failure


NO_TEACHER = "no teacher was found; name it by {}"


class Targets(NamedTuple):
    """Hold the watched models by role, and their paths for messages."""

    models: Mapping[str, nn.Module]
    paths: Mapping[str, str]
    note: str = ""  # what was not found


FindTargets = Callable[[], AbstractContextManager[Targets]]
"""A context manager that finds the models at each use, as modules may be replaced, in the run's precision."""


@dataclass
class RunState:
    """Hold what lives for one run. A copy or a pickle starts empty, without threads, locks and models."""

    rank_zero: RankZero = field(default_factory=RankZero)
    name: str = ""  # of this callback in tags
    failures: Failures = field(default_factory=lambda: Failures(HINT))
    budget: WaitBudget = field(default_factory=WaitBudget)
    cost: Cost = field(default_factory=Cost)
    active: bool = True  # whether attention is watched in this run
    not_found: bool = False  # whether the latest search found no model
    looks_again: bool = True  # whether to search once more after the first batch, which may build models
    training: bool = False  # whether the first step has begun: from then on no error ends the run
    opened: bool = False
    loggers: list[Any] = field(default_factory=list)
    folder: Path | None = None  # of the archive
    claim: Claim | None = None  # rank zero's lock on it
    publisher: Publisher | None = None  # on rank zero, from the first snapshot on
    roles: set[str] = field(default_factory=set)  # roles that have been watched so far
    failing: set[str] = field(default_factory=set)  # roles that failed in the latest snapshot
    root: nn.Module | None = None  # the outermost module, with FSDP's units around the models
    looks_at_wiring: bool = True
    wiring: WiringWatch | None = None  # on rank zero, from the first snapshot on
    findings: list[HealthFlag] = field(default_factory=list)  # flags of ``wiring``, stored with the next snapshot
    inputs: BackboneInputs | None = None  # hooks on the present batch, if it is observed
    inputs_known: bool = False  # whether the probe is known to be what the models receive
    batches_looked_at: int = 0
    held: Callable[[], None] | None = None  # publishes the first snapshot, once ``inputs`` confirm its probe

    def __reduce__(self) -> tuple[Any, ...]:
        return RunState, ()
