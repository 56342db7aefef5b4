"""`Tracker`: the base of all trackers, each of which has one table of the kinds of events that it takes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attn_monitor.trackers.events import KINDS, Animation, Event, Picture


class Tracker(ABC):
    """One logger.

    Args:
        logger: the user's own.
    """

    scalars_on_training_thread = False
    """Whether numbers must come from the training thread, as the run's own do."""
    head_keys: int | None = None
    """How many metrics of single heads it gets at most, whole layers from the last one back; None: all."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.methods: dict[type[Event[Any]], Callable[..., Any]] = {}  # by kind of event, called by `batch`

    @classmethod
    @abstractmethod
    def accepts(cls, logger: Any) -> bool:
        """Whether it is a logger of this kind."""

    @property
    def label(self) -> str:
        """Its name in messages."""
        return type(self.logger).__name__

    @contextmanager
    def batch(self, step: int) -> Iterator[Callable[[Event[Any]], object]]:
        """Log several events at a step: yields a function that logs one, which raises where it is refused."""
        yield lambda event: self.methods[type(event)](event, step)

    @property
    def ignored(self) -> list[str]:
        """Names of the kinds that it does not take."""
        return [kind.__name__ for kind in KINDS if kind not in self.methods]

    @property
    def run_folder(self) -> Path | None:
        """The local folder of the logger's run alone, None where it has none.

        Lightning's base class gives every logger a ``log_dir``, which is None unless there is one.
        """
        folder = getattr(self.logger, "log_dir", None)
        return Path(folder) if folder else None

    @property
    def media_folder(self) -> Path | None:
        """A folder on the disk that pictures are written to, None where they go to none."""
        # Of Lightning's loggers and SummaryWriter; of Lightning's W&B and MLflow loggers; of a W&B run.
        for name in ("log_dir", "save_dir", "dir"):
            folder = getattr(self.logger, name, None)
            if isinstance(folder, (str, os.PathLike)) and "://" not in str(folder):
                return Path(folder)
        return None

    def stored_bytes(self, event: Event[Any]) -> int:
        """Bytes on disk that it makes of an event, at most, of the kinds that are large."""
        if isinstance(event, Animation):
            return 2 * len(event.content)
        return event.content.nbytes if isinstance(event, Picture) else 0


def is_a(logger: Any, package: str, *names: str) -> bool:
    """Whether a class of this name and top-level package is among its bases, without importing the package."""
    return any(b.__name__ in names and b.__module__.split(".")[0] == package for b in type(logger).__mro__)


def is_lightning(logger: Any, name: str) -> bool:
    """Whether it is a logger of Lightning's of this class name, in any of its namespaces."""
    packages = ("lightning", "pytorch_lightning", "lightning_fabric")
    return any(is_a(logger, package, name) for package in packages)


def prefix_of(logger: Any) -> str:
    """What a Lightning logger puts before the names of metrics."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""
