"""Log to SwanLab, by its logger for Lightning or a run, in the cloud, on a server of one's own, or offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from attn_monitor.trackers.events import Animation, Lines, Page, Picture, Scalars, Table, Text
from attn_monitor.trackers.tracker import RowTracker, is_a


class SwanLab(RowTracker):
    """Log to a run. Tables and lines are its ECharts."""

    title, names_ignored = "SwanLab", True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self.methods = {
            Scalars: self.numbers,
            Picture: self._picture,
            Table: self._table,
            Lines: self._lines,
            Animation: self._animation,
            Page: self._page,
            Text: self._text,
        }

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept SwanLabLogger, and runs of the swanlab package."""
        return is_a(logger, "swanlab", "Run", "SwanLabRun", "SwanLabLogger")

    @property
    def run_folder(self) -> Path | None:
        """Return the run's own folder; the logger's is the one of all runs."""
        return None if getattr(self.run, "mode", None) in (None, "disabled") else Path(self.run.dir)

    def log_row(self, row: Mapping[str, Any], step: int) -> None:
        """Log all events of a step."""
        self.run.log(row, step=step)

    def _picture(self, picture: Picture) -> Mapping[str, Any]:
        import swanlab

        image = Image.fromarray(picture.content)
        return {picture.tag: swanlab.Image(image, caption=picture.caption, file_type="jpg")}

    def _table(self, table: Table) -> Mapping[str, Any]:
        import swanlab

        columns, rows = table.without_pictures
        return {table.tag: swanlab.echarts.Table().add(columns, rows)}

    def _lines(self, lines: Lines) -> Mapping[str, Any]:
        import swanlab

        steps, heads = lines.content
        chart = swanlab.echarts.Line().add_xaxis([str(step) for step in steps])
        for head, values in enumerate(heads):
            chart.add_yaxis(f"head {head}", list(values))
        return {lines.tag: chart}

    def _animation(self, animation: Animation) -> Mapping[str, Any]:
        import swanlab

        return {animation.tag: swanlab.Video(animation.content)}

    def _page(self, page: Page) -> Mapping[str, Any]:
        import swanlab

        return {page.tag: swanlab.Html(page.content)}

    def _text(self, text: Text) -> Mapping[str, Any]:
        import swanlab

        return {text.tag: swanlab.Text(text.content)}
