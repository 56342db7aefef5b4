"""Log to Comet, by Lightning's logger or an experiment of comet_ml, online or offline."""

from __future__ import annotations

import io
from typing import Any

from attn_monitor.trackers.events import Animation, Histogram, Lines, Page, Picture, Scalars, Table, Text
from attn_monitor.trackers.tracker import Tracker, is_a, is_lightning


class Comet(Tracker):
    """Log to an experiment. It has pictures, histograms, tables, curves and texts; the player is an asset."""

    title, names_ignored = "Comet", True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self.methods = {
            Scalars: lambda scalars, step: self.run.log_metrics(self.numbers(scalars), step=step),
            Picture: self._picture,
            Histogram: lambda event, step: self.run.log_histogram_3d(event.content, name=event.tag, step=step),
            Table: self._table,
            Lines: self._lines,
            Animation: self._animation,
            Page: lambda page, step: self.run.log_asset_data(page.content, name=f"{page.tag}.html", step=step),
            Text: lambda text, step: self.run.log_text(text.content, step=step, metadata={"tag": text.tag}),
        }

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept CometLogger, and experiments of the comet_ml package."""
        return is_a(logger, "comet_ml", "CometExperiment", "BaseExperiment") or is_lightning(logger, "CometLogger")

    def _picture(self, picture: Picture, step: int) -> None:
        file, metadata = io.BytesIO(picture.jpeg), {"caption": picture.caption}
        self.run.log_image(file, name=picture.tag, image_format="jpg", step=step, metadata=metadata)

    def _table(self, table: Table, step: int) -> None:
        columns, rows = table.without_pictures
        self.run.log_table(f"{table.tag}.csv", tabular_data=rows, headers=columns)

    def _lines(self, lines: Lines, step: int) -> None:
        steps, heads = lines.content
        for head, values in enumerate(heads):
            self.run.log_curve(f"{lines.tag}/head{head}", x=list(steps), y=list(values), step=step)

    def _animation(self, animation: Animation, step: int) -> None:
        file = io.BytesIO(animation.content)
        self.run.log_video(file, name=f"{animation.tag}.gif", format="gif", step=step)
