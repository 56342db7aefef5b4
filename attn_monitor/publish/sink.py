"""What a logger can take: metrics in any case, and what else its class has a method for.

A sink is a class of `Sink` for one kind of logger. All take metrics; what a sink offers besides is the methods of the
protocols here that it has, so that nobody has to write one that does nothing.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from attn_monitor.draw import canvas as drawing
from attn_monitor.measurements import HealthFlag
from attn_monitor.publish.attention_sinks import AttentionSinkRow
from attn_monitor.snapshot import Snapshot


@dataclass(frozen=True)
class Picture:
    """A drawn picture with the tag it is logged under; encoded once, for all loggers that want it encoded."""

    tag: str
    pixels: drawing.Pixels
    caption: str

    @cached_property
    def jpeg(self) -> bytes:
        """The picture as JPEG."""
        return drawing.jpeg(self.pixels)


@dataclass(frozen=True)
class Overlay:
    """A photograph with mask layers that a dashboard can switch on and off: (h, w) integers and their names."""

    tag: str
    photo: drawing.Pixels
    masks: Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class HeadRow:
    """One head on one image in the table at the end of a run."""

    image: str
    role: str
    layer: int
    head: int
    entropy: float
    mask_area: float
    thumbnail: drawing.Pixels


@dataclass(frozen=True)
class HeadCurves:
    """Entropy of every head of one layer over the steps of a run: ``heads[h][i]`` is of ``steps[i]``."""

    role: str
    layer: int
    steps: Sequence[int]
    heads: Sequence[Sequence[float]]


class Sink(ABC):
    """One logger. ``name`` is that of the callback; tags that a sink makes itself are under it."""

    on_training_thread = False
    """Whether it must be called on the training thread alone, as the run itself does."""
    pictures_together = False
    """Whether all pictures of a step in one call are cheaper than one call for each."""
    head_keys: int | None = None
    """How many metrics of single heads it gets at most, whole layers from the last one back; None: all."""

    def __init__(self, logger: Any, name: str = "") -> None:
        self.logger, self.name = logger, name

    @classmethod
    @abstractmethod
    def accepts(cls, logger: Any) -> bool:
        """Whether it is a logger of this kind."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers by tag."""

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
        for name in (
            "log_dir",
            "save_dir",
            "dir",
        ):  # of Lightning's loggers and SummaryWriter; of W&B, MLflow; of a run
            folder = getattr(self.logger, name, None)
            if isinstance(folder, (str, os.PathLike)) and "://" not in str(folder):
                return Path(folder)
        return None

    def stored_bytes(self, pictures: Sequence[Picture]) -> int:
        """Bytes on disk that it makes of pictures, at most."""
        return sum(picture.pixels.nbytes for picture in pictures)


@runtime_checkable
class DefinesAxis(Protocol):
    """A dashboard that has to be told, once and before anything is logged, what attention is drawn over."""

    def define_axis(self) -> None:
        """The step of the run, for all tags of attention."""


@runtime_checkable
class TakesFlags(Protocol):
    """Shows health flags in words; others have their number only."""

    def log_flags(self, flags: Sequence[HealthFlag], step: int) -> None:
        """The flags of one step."""


@runtime_checkable
class TakesPictures(Protocol):
    """Shows pictures."""

    def log_pictures(self, pictures: Sequence[Picture], step: int) -> None:
        """Pictures of one step."""


@runtime_checkable
class DescribesRun(Protocol):
    """Has a place for words and for the layout of charts, written once for each run."""

    def describe_run(self, text: str, snapshot: Snapshot) -> None:
        """Markdown, and charts for the metrics of a snapshot."""


@runtime_checkable
class TakesHistograms(Protocol):
    """Shows how a value is spread."""

    def log_histograms(self, snapshot: Snapshot) -> None:
        """Entropy over heads and images, for each role and layer."""


@runtime_checkable
class TakesOverlays(Protocol):
    """Shows masks that can be switched on and off."""

    def log_overlays(self, overlays: Sequence[Overlay], step: int) -> None:
        """Photographs with masks."""


@runtime_checkable
class PlaysAnimations(Protocol):
    """Plays animated GIFs."""

    def log_animation(self, tag: str, gif: bytes, step: int) -> None:
        """One animation."""


@runtime_checkable
class TakesReports(Protocol):
    """Keeps a page that one can ask, written at the end of a run."""

    def log_report(self, tag: str, page: str, step: int) -> None:
        """One self-contained HTML page, of 4 MB at most."""


@runtime_checkable
class KeepsTables(Protocol):
    """Has tables and charts of its own, written at the end of a run."""

    def log_tables(self, rows: Sequence[HeadRow], curves: Sequence[HeadCurves], step: int) -> None:
        """A table of the last snapshot, and one chart of all heads for each layer."""


@runtime_checkable
class TellsAttentionSinks(Protocol):
    """Shows the table of attention sinks, written at the end of a run."""

    def log_attention_sinks(self, rows: Sequence[AttentionSinkRow], step: int) -> None:
        """One row for each place where attention collects."""


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
