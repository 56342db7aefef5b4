"""`Tracker`: the base class of all trackers, with one table of the kinds of events that it logs."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attn_monitor.trackers.events import KINDS, Animation, Event, Picture, Scalars


class Tracker(ABC):
    """Log events to one logger.

    Args:
        logger: the user's logger.
    """

    scalars_on_training_thread = False
    """Whether numbers must be logged on the training thread, as the run's own are."""
    head_keys: int | None = None
    """How many metrics of single heads to log at most, by whole layers from the last one back; None logs all."""

    title = ""
    """The tracker's name in messages; empty for that of the logger's class."""
    names_ignored = False
    """Whether what it does not take is named when a run begins."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.methods: dict[type[Event[Any]], Callable[..., Any]] = {}  # by kind of event, called by `batch`

    @classmethod
    @abstractmethod
    def accepts(cls, logger: Any) -> bool:
        """Whether this tracker is for a logger."""

    @property
    def label(self) -> str:
        """Return the tracker's name in messages."""
        return self.title or type(self.logger).__name__

    @property
    def run(self) -> Any:
        """Return the run of a Lightning logger, or the logger itself if it is a run."""
        return self.logger.experiment if hasattr(self.logger, "log_hyperparams") else self.logger

    def numbers(self, scalars: Scalars) -> dict[str, float]:
        """Return numbers by tag, with a Lightning logger's prefix."""
        prefix = prefix_of(self.logger)
        return {f"{prefix}{tag}": value for tag, value in scalars.content.items()}

    @contextmanager
    def batch(self, step: int) -> Iterator[Callable[[Event[Any]], object]]:
        """Yield a function that logs one event at a step, or raises an exception if the logger fails."""
        yield lambda event: self.methods[type(event)](event, step)

    @property
    def ignored(self) -> list[str]:
        """Return the names of the kinds of events that this tracker does not take."""
        return [kind.__name__ for kind in KINDS if kind not in self.methods]

    @property
    def run_folder(self) -> Path | None:
        """Return the local folder of the logger's run alone, None if it has none.

        Every Lightning logger has a ``log_dir``, which may be None.
        """
        return local_folder(getattr(self.logger, "log_dir", None))

    @property
    def media_folder(self) -> Path | None:
        """Return a folder on the disk that pictures are written to, None if there is no such disk."""
        # In this order: Lightning's loggers and SummaryWriter, its W&B and MLflow loggers, a W&B run.
        for name in ("log_dir", "save_dir", "dir"):
            if folder := local_folder(getattr(self.logger, name, None)):
                return folder
        return None

    def stored_bytes(self, event: Event[Any]) -> int:
        """Return how many bytes an event takes on disk at most; 0 for kinds that are small."""
        if isinstance(event, Animation):
            return 2 * len(event.content)
        return event.content.nbytes if isinstance(event, Picture) else 0


class RowTracker(Tracker):
    """Log all events of a batch as one row; ``methods`` return parts of it."""

    @abstractmethod
    def log_row(self, row: Mapping[str, Any], step: int) -> None:
        """Log a row of values by tag."""

    @contextmanager
    def batch(self, step: int) -> Iterator[Callable[[Event[Any]], object]]:
        """Collect the events of a row, and log it."""
        row: dict[str, Any] = {}
        yield lambda event: row.update(self.methods[type(event)](event))
        if row:
            self.log_row(row, step)


def local_folder(folder: Any) -> Path | None:
    """Return a folder as a path, None where there is none or it is an address, such as ``s3://bucket/runs``."""
    is_path = isinstance(folder, (str, os.PathLike)) and os.fspath(folder) and "://" not in str(folder)
    return Path(folder) if is_path else None


def is_a(logger: Any, package: str, *names: str) -> bool:
    """Whether a base class has one of these names and this top-level package, without importing the package."""
    return any(b.__name__ in names and b.__module__.split(".")[0] == package for b in type(logger).__mro__)


def is_lightning(logger: Any, name: str) -> bool:
    """Whether a logger is Lightning's class of this name, in any of its namespaces."""
    packages = ("lightning", "pytorch_lightning", "lightning_fabric")
    return any(is_a(logger, package, name) for package in packages)


def prefix_of(logger: Any) -> str:
    """Return a Lightning logger's prefix for names of metrics, empty if it has none."""
    prefix, joint = getattr(logger, "_prefix", ""), getattr(logger, "LOGGER_JOIN_CHAR", None)
    return f"{prefix}{joint}" if prefix and joint is not None else ""
