"""Log to Trackio, by a run, as `trackio.init` returns it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attn_monitor.trackers.events import Alert, Animation, Event, Histogram, Page, Picture, Scalars, Table, Text
from attn_monitor.trackers.tracker import RowTracker, is_a


class Trackio(RowTracker):
    """Log to a run. Media are copied from files, as it would encode pictures as PNG, several times the bytes."""

    title, names_ignored = "Trackio", True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._files = Path()  # for the media of a batch
        self.methods = {
            Scalars: self.numbers,
            Picture: self._picture,
            Histogram: self._histogram,
            Table: self._table,
            Animation: self._animation,
            Page: self._page,
            Text: self._text,
            Alert: self._alert,
        }

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept runs of the trackio package."""
        return is_a(logger, "trackio", "Run")

    @contextmanager
    def batch(self, step: int) -> Iterator[Callable[[Event[Any]], object]]:
        """Log all events as one row, and remove their files."""
        with tempfile.TemporaryDirectory() as folder:
            self._files = Path(folder)
            with super().batch(step) as log:
                yield log

    def log_row(self, row: Mapping[str, Any], step: int) -> None:
        """Log all events of a step."""
        self.run.log(dict(row), step=step)

    def _file(self, content: bytes, suffix: str) -> str:
        path = self._files / f"{len(list(self._files.iterdir()))}{suffix}"
        path.write_bytes(content)
        return str(path)

    def _picture(self, picture: Picture) -> Mapping[str, Any]:
        import trackio

        return {picture.tag: trackio.Image(self._file(picture.jpeg, ".jpg"), caption=picture.caption)}

    def _histogram(self, histogram: Histogram) -> Mapping[str, Any]:
        import trackio

        return {histogram.tag: trackio.Histogram(histogram.content)} if histogram.content.size else {}

    def _table(self, table: Table) -> Mapping[str, Any]:
        import trackio

        columns, rows = table.without_pictures
        return {table.tag: trackio.Table(columns=columns, data=rows)}

    def _animation(self, animation: Animation) -> Mapping[str, Any]:
        import trackio

        return {animation.tag: trackio.Video(self._file(animation.content, ".gif"))}

    def _page(self, page: Page) -> Mapping[str, Any]:
        import trackio

        return {page.tag: trackio.Html(page.content, inject=False)}

    def _text(self, text: Text) -> Mapping[str, Any]:
        import trackio

        return {text.tag: trackio.Markdown(text.content)}

    def _alert(self, alert: Alert) -> Mapping[str, Any]:
        self.run.alert(alert.title, alert.content)
        return {}
