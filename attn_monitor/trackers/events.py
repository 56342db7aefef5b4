"""The kinds of events that a snapshot becomes. Each is drawn or computed when a tracker reads its content."""

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
    """A function that is called once: its result is kept for later calls, on whichever threads, until `forget`."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute, self._lock, self._keeps = compute, threading.Lock(), True
        self._kept: list[T] = []

    def __call__(self) -> T:
        """Return the result."""
        with self._lock:
            if self._kept:
                return self._kept[0]
            result = self._compute()
            if self._keeps:
                self._kept.append(result)
            return result

    def forget(self) -> None:
        """Drop the result; from now on each call computes it."""
        self._keeps, self._kept = False, []


@dataclass(frozen=True, eq=False)
class Event(Generic[T]):
    """One thing to show.

    Args:
        tag: what it is called, such as "attn_maps/cat".
        make: computes the content, once for all trackers, on the thread of the first that reads it.
        title: for people, where a kind has one.
    """

    tag: str
    make: Callable[[], T]
    title: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.make, Once):
            object.__setattr__(self, "make", Once(self.make))

    @property
    def content(self) -> T:
        """What is shown, of the type that the class says."""
        return self.make()

    def named(self, name: str) -> Event[T]:
        """The same under the name of a callback, see `prefixed`."""
        return replace(self, tag=prefixed(self.tag, name), title=self.title and titled(self.title, name))

    def forget(self) -> None:
        """Do not keep the content any more."""
        if isinstance(self.make, Once):
            self.make.forget()


class Scalars(Event[Mapping[str, float]]):
    """Numbers by tag."""

    def named(self, name: str) -> Scalars:
        """With all their tags under the name."""
        return Scalars(self.tag, lambda: {prefixed(tag, name): value for tag, value in self.content.items()})


@dataclass(frozen=True, eq=False)
class Picture(Event[Pixels]):
    """A picture, (height, width, 3) uint8, with a caption."""

    caption: str = ""

    @cached_property
    def jpeg(self) -> bytes:
        """The picture as JPEG."""
        return canvas.jpeg(self.content)


@dataclass(frozen=True, eq=False)
class Masks(Event[tuple[Pixels, Mapping[str, Array]]]):
    """A photograph, (height, width, 3) uint8, and masks to lay over it, (height, width) bool by name."""


class Histogram(Event[Array]):
    """Values, (n,) float32, of which the distribution is shown."""


@dataclass(frozen=True, eq=False)
class Table(Event[Sequence[Sequence[Any]]]):
    """Rows of cells: text, numbers, None, or pictures (height, width, 3) uint8."""

    columns: Sequence[str] = ()


class Lines(Event[tuple[Sequence[int], Sequence[Sequence[float]]]]):
    """A chart with a title: steps, and for each head its values at these."""


class Layout(Event[Mapping[tuple[str, str], str]]):
    """Charts of scalars, by section and title: a regular expression for the tags of the scalars in it."""

    def named(self, name: str) -> Layout:
        """With sections and tags under the name."""
        charts = self.content.items
        return Layout(self.tag, lambda: {(titled(s, name), title): prefixed(tag, name) for (s, title), tag in charts()})


class Animation(Event[bytes]):
    """An animated GIF."""


class Page(Event[str]):
    """A self-contained HTML page."""


class Text(Event[str]):
    """Markdown."""


class Alert(Event[str]):
    """Markdown with a title that somebody should read at once."""


KINDS: tuple[type[Event[Any]], ...] = (
    Scalars, Picture, Masks, Histogram, Table, Lines, Layout, Animation, Page, Text, Alert,
)  # fmt: skip
