"""`RunState`: what watching holds while one run lasts, and nothing between runs."""

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

HINT = 'on_error="raise" shows the traceback'  # said with each failure


NO_TEACHER = "no teacher was found; name it by {}"


class Targets(NamedTuple):
    """What is watched now: role to model, and role to the model's path for people."""

    models: Mapping[str, nn.Module]
    paths: Mapping[str, str]
    note: str = ""  # what was not found


FindTargets = Callable[[], AbstractContextManager[Targets]]
"""Finds them each time, as modules may be replaced, and holds the precision in which they run."""


@dataclass
class RunState:
    """What lives for one run. A copy is as new: threads, locks, models and claims are not copied, nor pickled."""

    rank_zero: RankZero = field(default_factory=RankZero)
    name: str = ""  # in tags, beside other callbacks of the run
    failures: Failures = field(default_factory=lambda: Failures(HINT))
    budget: WaitBudget = field(default_factory=WaitBudget)
    cost: Cost = field(default_factory=Cost)
    active: bool = True  # False: attention is not watched in this run
    not_found: bool = False  # no model was, in the latest look
    looks_again: bool = True  # after the first batch, which may build models
    training: bool = False  # the first step has begun, so that errors end the run no more
    opened: bool = False
    loggers: list[Any] = field(default_factory=list)
    folder: Path | None = None  # of the archive
    claim: Claim | None = None  # on it, by rank zero
    publisher: Publisher | None = None  # of rank zero, from the first snapshot on
    roles: set[str] = field(default_factory=set)  # that were watched so far
    failing: set[str] = field(default_factory=set)  # roles that were left out of the latest look
    root: nn.Module | None = None  # the outermost module, with FSDP's units around the models
    looks_at_wiring: bool = True
    wiring: WiringWatch | None = None  # of rank zero, from the first snapshot on
    findings: list[HealthFlag] = field(default_factory=list)  # of it, for the next snapshot
    inputs: BackboneInputs | None = None  # of the batch that is looked at
    inputs_known: bool = False  # the images that are watched are known to be what the models get
    batches_looked_at: int = 0
    held: Callable[[], None] | None = None  # publishes the first snapshot, once they are known to be that

    def __reduce__(self) -> tuple[Any, ...]:
        return RunState, ()
