"""`Targets`: the models to watch, which are found at each use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import nn

NO_TEACHER = "no teacher was found; name it by {}"


class Targets(NamedTuple):
    """Hold the watched models by role, and their paths for messages."""

    models: Mapping[str, nn.Module]
    paths: Mapping[str, str]
    note: str = ""  # what was not found


FindTargets = Callable[[], AbstractContextManager[Targets]]
"""A context manager that finds the models at each use, as modules may be replaced, in the run's precision."""
