"""Log to ClearML, by a task or its logger.

A run that logs to TensorBoard while a task is open needs none of this: ClearML takes what is written to event files.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

import numpy as np

from attn_monitor.trackers.events import Animation, Event, Histogram, Lines, Page, Picture, Scalars, Table, Text
from attn_monitor.trackers.tracker import Tracker, is_a

BINS = 30


class ClearML(Tracker):
    """Log to a task: scalars, plots and debug samples."""

    title, names_ignored = "ClearML", True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self.methods = {
            Scalars: self._scalars,
            Picture: lambda picture, step: self._media(picture, picture.jpeg, ".jpg", step),
            Animation: lambda animation, step: self._media(animation, animation.content, ".gif", step),
            Page: lambda page, step: self._media(page, page.content.encode(), ".html", step),
            Histogram: self._histogram,
            Table: self._table,
            Lines: self._lines,
            Text: lambda text, step: self.run.report_text(f"{text.tag}\n{text.content}", print_console=False),
        }

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept tasks of the clearml package, and their loggers."""
        return is_a(logger, "clearml", "Task", "Logger")

    @property
    def run(self) -> Any:
        """Return the task's logger, or the logger itself if it is one."""
        return self.logger.get_logger() if hasattr(self.logger, "get_logger") else self.logger

    def _scalars(self, scalars: Scalars, step: int) -> None:
        """Put heads of one layer into one chart, and of each metric all roles and layers."""
        for tag, value in scalars.content.items():
            if not math.isfinite(value):  # ClearML would draw NaN and infinity as 0
                continue
            first, *middle, last = tag.split("/")
            of_head = re.fullmatch(r"head\d+", last) or not middle
            title, series = tag.rpartition("/")[::2] if of_head else (f"{first}/{last}", "/".join(middle))
            self.run.report_scalar(title, series, value, step)

    def _media(self, event: Event[Any], content: bytes, suffix: str, step: int) -> None:
        title, series = _title_and_series(event)
        self.run.report_media(title, series, step, stream=io.BytesIO(content), file_extension=suffix)

    def _histogram(self, histogram: Histogram, step: int) -> None:
        if histogram.content.size:
            counts, edges = np.histogram(histogram.content, BINS)
            labels = [f"{edge:.3g}" for edge in edges[:-1]]
            self.run.report_histogram(*_title_and_series(histogram), counts.tolist(), step, xlabels=labels)

    def _table(self, table: Table, step: int) -> None:
        columns, rows = table.without_pictures
        self.run.report_table(*_title_and_series(table), step, table_plot=[columns, *rows])

    def _lines(self, lines: Lines, step: int) -> None:
        steps, heads = lines.content
        for head, values in enumerate(heads):
            # NaN would be written as the text "nan", of which Plotly makes categories where it prevails.
            points = [(at, value) for at, value in zip(steps, values, strict=True) if math.isfinite(value)]
            if points:
                self.run.report_scatter2d(lines.title, f"head {head}", points, step, xaxis="step", mode="lines")


def _title_and_series(event: Event[Any]) -> tuple[str, str]:
    """Split a tag, as ClearML groups what it shows by a title."""
    title, _, series = event.tag.partition("/")
    return title, series or title
