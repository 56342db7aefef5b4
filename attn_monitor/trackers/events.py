"""Define the kinds of events. Each draws or computes its content when a tracker first reads it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from attn_monitor.draw import canvas
from attn_monitor.draw.canvas import Pixels
from attn_monitor.trackers.naming import prefixed, titled

T = TypeVar("T")
Array = np.ndarray[Any, Any]


class Once(Generic[T]):
    """Call a function once and keep its result for later calls, on any thread, until `forget`."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute, self._lock, self._keeps = compute, threading.Lock(), True
        self._kept: list[T] = []

    def __call__(self) -> T:
        """Return the result, computed now if it is not kept."""
        with self._lock:
            if self._kept:
                return self._kept[0]
            result = self._compute()
            if self._keeps:
                self._kept.append(result)
            return result

    def forget(self) -> None:
        """Drop the result; each later call computes it."""
        self._keeps, self._kept = False, []


@dataclass(frozen=True, eq=False)
class Event(Generic[T]):
    """Hold one thing to show.

    Args:
        tag: its name in trackers, such as "attn_maps/cat".
        make: computes the content, once for all trackers, on the thread of the first that reads it.
        title: for kinds that show one.
    """

    tag: str
    make: Callable[[], T]
    title: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.make, Once):
            object.__setattr__(self, "make", Once(self.make))

    @property
    def content(self) -> T:
        """Return what is shown, of the type in the class's brackets."""
        return self.make()

    def named(self, name: str) -> Event[T]:
        """Return the event with a callback's name in its tag, see `prefixed`."""
        return replace(self, tag=prefixed(self.tag, name), title=self.title and titled(self.title, name))

    def forget(self) -> None:
        """Stop keeping the content."""
        if isinstance(self.make, Once):
            self.make.forget()


class Scalars(Event[Mapping[str, float]]):
    """Numbers by tag."""

    def named(self, name: str) -> Scalars:
        """Return the numbers with a callback's name in all their tags."""
        return Scalars(self.tag, lambda: {prefixed(tag, name): value for tag, value in self.content.items()})


@dataclass(frozen=True, eq=False)
class Picture(Event[Pixels]):
    """A picture, (height, width, 3) uint8, with a caption; ``so_far`` is whether it shows the run up to its step."""

    caption: str = ""
    so_far: bool = False

    @cached_property
    def jpeg(self) -> bytes:
        """Encode the picture as JPEG."""
        return canvas.jpeg(self.content)

    @cached_property
    def encoded(self) -> bytes:
        """Encode the picture for a browser, as small as it gets."""
        return canvas.encoded(self.content)


@dataclass(frozen=True, eq=False)
class Masks(Event[tuple[Pixels, Mapping[str, Array]]]):
    """A photograph, (height, width, 3) uint8, and masks to lay over it, (height, width) bool by name."""


class Histogram(Event[Array]):
    """Values, (n,) float32, for a chart of their distribution."""


@dataclass(frozen=True, eq=False)
class Table(Event[Sequence[Sequence[Any]]]):
    """Rows of cells: text, numbers, None, or pictures (height, width, 3) uint8."""

    columns: Sequence[str] = ()

    @property
    def without_pictures(self) -> tuple[list[str], list[list[Any]]]:
        """Return columns and rows without the columns of pictures."""
        rows = list(self.content)
        kept = [i for i in range(len(self.columns)) if not any(isinstance(row[i], np.ndarray) for row in rows)]
        return [self.columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


class Lines(Event[tuple[Sequence[int], Sequence[Sequence[float]]]]):
    """A chart with a title: steps, and for each head its values at these steps."""


class Layout(Event[Mapping[tuple[str, str], str]]):
    """Charts of scalars: (section, title) to a regular expression for the tags of the scalars in the chart."""

    def named(self, name: str) -> Layout:
        """Return the layout with a callback's name in sections and tags."""
        charts = self.content.items
        return Layout(self.tag, lambda: {(titled(s, name), title): prefixed(tag, name) for (s, title), tag in charts()})


class Animation(Event[bytes]):
    """An animated GIF."""


class Page(Event[str]):
    """A self-contained HTML page."""


@dataclass(frozen=True, eq=False)
class Text(Event[str]):
    """Markdown; ``sums_up`` is whether it is a line on the whole run, for where trackers list runs."""

    sums_up: bool = False


class Alert(Event[str]):
    """Markdown with a title, for a notification."""


KINDS: tuple[type[Event[Any]], ...] = (
    Scalars, Picture, Masks, Histogram, Table, Lines, Layout, Animation, Page, Text, Alert,
)  # fmt: skip
