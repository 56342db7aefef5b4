"""Loggers that are known by their methods: `log_metrics` of all, `log_image` or `add_image` of those with pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from attn_monitor.publish.sink import Picture, Sink, is_lightning


class MetricsSink(Sink):
    """Any logger: its `log_metrics`."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """All."""
        return True

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """By the logger's own method."""
        self.logger.log_metrics(dict(metrics), step=step)


class CSVSink(MetricsSink):
    """CSVLogger, which collects rows in a list that it writes and empties.

    Called from a second thread at that moment, it would lose the run's own rows. Others send each call on by itself.
    """

    on_training_thread = True

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """CSVLogger, unless a subclass takes images."""
        return is_lightning(logger, "CSVLogger")


class LogImageSink(MetricsSink):
    """A logger with Lightning's ``log_image(key, images, step)``."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """By the method, the CSV logger's subclasses included."""
        return _has_method(logger, "log_image")

    def log_pictures(self, pictures: Sequence[Picture], step: int) -> None:
        """One call for each."""
        for picture in pictures:
            self.logger.log_image(key=picture.tag, images=[picture.pixels], step=step)


class AddImageSink(MetricsSink):
    """A logger with a SummaryWriter's ``add_image(tag, image, step, dataformats=…)``, or whose experiment has it."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """By the method."""
        return _add_image(logger) is not None

    def log_pictures(self, pictures: Sequence[Picture], step: int) -> None:
        """One call for each."""
        add = cast("Callable[..., None]", _add_image(self.logger))
        for picture in pictures:
            add(picture.tag, picture.pixels, step, dataformats="HWC")


def _add_image(logger: Any) -> Callable[..., None] | None:
    for owner in (logger, _attribute(logger, "experiment")):
        if _has_method(owner, "add_image"):
            return cast("Callable[..., None]", owner.add_image)
    return None


def _has_method(owner: Any, name: str) -> bool:
    return callable(_attribute(owner, name))


def _attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name, None)
    except Exception:  # a property of somebody's logger, asked for on the training thread
        return None
