"""Log to Weights & Biases, by Lightning's logger or a plain run. Each row holds its step."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attn_monitor.trackers.events import Alert, Animation, Lines, Masks, Page, Picture, Scalars, Table, Text
from attn_monitor.trackers.tracker import RowTracker, is_a, is_lightning, prefix_of

AXIS = "trainer/global_step"  # the same key as Lightning's logger


class WeightsAndBiases(RowTracker):
    """Log to a W&B run. All events of a batch are one row, so that the slider shows them together."""

    head_keys = 2_000  # W&B advises fewer than 10,000 distinct metrics in a project, the run's own among them

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._has_axis = False
        self.methods = {
            Scalars: self.numbers,  # the logger's ``log_metrics`` would drop the step with ``sync_tensorboard``
            Picture: self._picture,
            Masks: self._masks,
            Table: self._table,
            Lines: self._lines,
            Animation: self._animation,
            Page: self._page,
            Text: self._text,
            Alert: self._alert,
        }

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept WandbLogger, and runs of the wandb package."""
        return is_a(logger, "wandb", "Run") or is_lightning(logger, "WandbLogger")

    @property
    def run_folder(self) -> Path | None:
        """Return the run's first folder, which keeps the archive: W&B makes another one when a run is resumed."""
        run = self.run
        if run.disabled:
            return None
        folder = Path(run.sync_dir)
        parts = [p for p in folder.parent.glob(f"*run-*-{run.id}") if p.is_dir()]
        return min([folder, *parts], key=lambda p: p.name.partition("run-")[2])

    def log_row(self, row: Mapping[str, Any], step: int) -> None:
        """Log a row without W&B's own step, which must not decrease: this thread logs later than training."""
        self._define_axis()
        self.run.log({**row, AXIS: step})

    def _define_axis(self) -> None:
        """Draw charts and pictures of attention over the global step.

        Lightning defines this axis only for runs that it starts itself, and not with ``sync_tensorboard``.
        """
        if not self._has_axis:
            self.run.define_metric(AXIS)
            for tags in {"attn*", f"{prefix_of(self.logger)}attn*"}:
                self.run.define_metric(tags, step_metric=AXIS)
            self._has_axis = True

    def _picture(self, picture: Picture) -> Mapping[str, Any]:
        import wandb

        return {picture.tag: wandb.Image(picture.content, caption=picture.caption, file_type="jpg")}

    def _masks(self, masks: Masks) -> Mapping[str, Any]:
        import wandb

        labels = {0: "outside", 1: "attended"}
        photo, by_name = masks.content
        layers = {n: {"mask_data": m.astype(np.uint8), "class_labels": labels} for n, m in by_name.items()}
        return {masks.tag: wandb.Image(photo, masks=layers, file_type="jpg")}

    def _table(self, table: Table) -> Mapping[str, Any]:
        import wandb

        def cell(value: Any) -> Any:
            return wandb.Image(value, file_type="jpg") if isinstance(value, np.ndarray) else value

        rows = [list(map(cell, row)) for row in table.content]
        return {table.tag: wandb.Table(columns=list(table.columns), data=rows)}

    def _lines(self, lines: Lines) -> Mapping[str, Any]:
        import wandb

        steps, heads = lines.content
        names = [f"head {head}" for head in range(len(heads))]
        values = [list(head) for head in heads]
        chart = wandb.plot.line_series(xs=list(steps), ys=values, keys=names, title=lines.title, xname="step")
        return {lines.tag: chart}

    def _animation(self, animation: Animation) -> Mapping[str, Any]:
        import wandb

        return {animation.tag: wandb.Video(io.BytesIO(animation.content), format="gif")}

    def _page(self, page: Page) -> Mapping[str, Any]:
        """Show the page in a frame, without W&B's injected styles, which its content policy forbids."""
        import wandb

        return {page.tag: wandb.Html(page.content, inject=False, data_is_not_path=True)}

    def _text(self, text: Text) -> Mapping[str, Any]:
        """Put a line on the whole run into its summary, a column of the table of runs; flags come as alerts."""
        if text.sums_up:
            self.run.summary[text.tag] = text.content
        return {}

    def _alert(self, alert: Alert) -> Mapping[str, Any]:
        self.run.alert(title=alert.title, text=alert.content, level="WARN")
        return {}
