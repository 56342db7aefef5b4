"""Log to loggers that are known by their methods alone, and to the CSV logger."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from attn_monitor.trackers.events import KINDS, Event, Histogram, Picture, Scalars, Table, Text
from attn_monitor.trackers.tracker import Tracker, is_lightning

WRITER_METHODS: Mapping[str, tuple[type[Event[Any]], Callable[[Any, Any, int], object]]] = {
    "add_image": (Picture, lambda add, event, step: add(event.tag, event.content, step, dataformats="HWC")),
    "add_histogram": (Histogram, lambda add, event, step: add(event.tag, event.content, step)),
    "add_text": (Text, lambda add, event, step: add(event.tag, event.content, step)),
}
"""A SummaryWriter's methods, the kind of event for each, and how it is passed."""

LOGGER_METHODS: Mapping[str, tuple[type[Event[Any]], Callable[[Any, Any, int], object]]] = {
    "log_metrics": (Scalars, lambda log, event, step: log(dict(event.content), step=step)),
    "log_image": (Picture, lambda log, event, step: log(key=event.tag, images=[event.content], step=step)),
    "log_table": (
        Table,
        lambda log, event, step: log(
            key=event.tag, columns=list(event.columns), data=[list(row) for row in event.content], step=step
        ),
    ),
}
"""The same for the methods of Lightning's loggers."""


class Generic(Tracker):
    """Log to any logger by the methods that it has.

    These are the methods in ``LOGGER_METHODS`` and ``WRITER_METHODS`` (also of its ``experiment``), and
    ``log_attention_event(event, step)``, which receives every event that none of the others takes. A method of such a
    name with other arguments does not count.
    """

    names_ignored = True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        own = _method(logger, "log_attention_event")
        if own and _takes(own, lambda log, event, step: log(event, step)):
            self.methods = dict.fromkeys(KINDS, own)
        writer = next((w for w in (logger, _attribute(logger, "experiment")) if _method(w, "add_image")), logger)
        for owner, methods in ((writer, WRITER_METHODS), (logger, LOGGER_METHODS)):
            for name, (kind, call) in methods.items():
                method = _method(owner, name)
                if method and _takes(method, call):
                    self.methods[kind] = partial(call, method)

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept any logger."""
        return True


class CSV(Generic):
    """Log to CSVLogger on the training thread.

    It collects rows in a list that it writes and empties; a second thread could make it lose the run's own rows.
    """

    scalars_on_training_thread = True
    names_ignored = False

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept CSVLogger and its subclasses."""
        return is_lightning(logger, "CSVLogger")


def _method(owner: Any, name: str) -> Callable[..., Any] | None:
    method = _attribute(owner, name)
    return method if callable(method) else None


def _takes(method: Callable[..., Any], call: Callable[[Any, Any, int], object]) -> bool:
    """Whether a method has the parameters that it is called with, as far as its signature is known."""
    try:
        bind = inspect.signature(method).bind
    except Exception:  # some of C have none, and the user's may raise anything
        return True
    try:
        call(bind, SimpleNamespace(tag="", content=(), columns=()), 0)
    except TypeError:
        return False
    return True


def _attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name, None)
    except Exception:  # a property of the user's logger may raise anything
        return None
