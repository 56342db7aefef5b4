"""Weights & Biases: Lightning's logger or a plain run. Rows carry the step themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from attn_monitor.measurements import HealthFlag
from attn_monitor.publish.attention_sinks import COLUMNS, AttentionSinkRow
from attn_monitor.publish.sink import HeadCurves, HeadRow, Overlay, Picture, Sink, is_a, is_lightning, prefix_of
from attn_monitor.publish.tags import renamed, titled

AXIS = "trainer/global_step"  # Lightning's own name for it


class WandbSink(Sink):
    """A W&B run."""

    pictures_together = True  # as one row
    head_keys = 2_000  # W&B advises fewer than 10,000 distinct metrics in a project, the run's own among them

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """WandbLogger, and runs of the wandb package."""
        return is_a(logger, "wandb", "Run") or is_lightning(logger, "WandbLogger")

    @property
    def run(self) -> Any:
        """The logger's run, or the logger itself when it is one."""
        return self.logger.experiment if hasattr(self.logger, "experiment") else self.logger

    @property
    def run_folder(self) -> Path | None:
        """The first folder of this run: a run that is resumed gets another one, and its archive stays."""
        run = self.run
        if run.disabled:
            return None
        folder = Path(run.sync_dir)
        parts = [p for p in folder.parent.glob(f"*run-*-{run.id}") if p.is_dir()]
        return min([folder, *parts], key=lambda p: p.name.partition("run-")[2])

    def define_axis(self) -> None:
        """Charts and pictures of attention are drawn over the global step.

        Lightning says so only for runs that it starts itself, and not when W&B follows TensorBoard.
        """
        self.run.define_metric(AXIS)
        for tags in {"attn*", f"{prefix_of(self.logger)}attn*"}:
            self.run.define_metric(tags, step_metric=AXIS)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Not by the logger's log_metrics, which drops the step when W&B follows TensorBoard."""
        prefix = prefix_of(self.logger)
        self._log({f"{prefix}{tag}": value for tag, value in metrics.items()}, step)

    def log_pictures(self, pictures: Sequence[Picture], step: int) -> None:
        """As media."""
        import wandb

        self._log({p.tag: wandb.Image(p.pixels, caption=p.caption, file_type="jpg") for p in pictures}, step)

    def log_overlays(self, overlays: Sequence[Overlay], step: int) -> None:
        """As images with masks."""
        import wandb

        labels = {0: "outside", 1: "attended"}

        def masks(overlay: Overlay) -> dict[str, Any]:
            return {
                name: {"mask_data": mask.astype(np.uint8), "class_labels": labels}
                for name, mask in overlay.masks.items()
            }

        self._log({o.tag: wandb.Image(o.photo, masks=masks(o), file_type="jpg") for o in overlays}, step)

    def log_flags(self, flags: Sequence[HealthFlag], step: int) -> None:
        """As an alert."""
        text = "\n".join(f"- {flag}" for flag in flags)
        self.run.alert(title=titled("attention health", self.name), text=text, level="WARN")

    def log_animation(self, tag: str, gif: bytes, step: int) -> None:
        """As a video."""
        import wandb

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{tag.replace('/', '_')}.gif"
            path.write_bytes(gif)
            self._log({tag: wandb.Video(str(path), format="gif")}, step)

    def log_report(self, tag: str, page: str, step: int) -> None:
        """As a page in a frame. Nothing is put into it, as its policy would refuse that."""
        import wandb

        self._log({tag: wandb.Html(page, inject=False, data_is_not_path=True)}, step)

    def log_tables(self, rows: Sequence[HeadRow], curves: Sequence[HeadCurves], step: int) -> None:
        """One row of media for all."""
        import wandb

        table = wandb.Table(columns=["image", "role", "layer", "head", "entropy", "mask area", "attention"])
        for row in rows:
            thumbnail = wandb.Image(row.thumbnail, file_type="jpg")
            table.add_data(row.image, row.role, row.layer, row.head, row.entropy, row.mask_area, thumbnail)
        media: dict[str, Any] = {renamed("attn_table", self.name): table}
        for curve in curves:
            tag = renamed(f"attn_heads_chart/{curve.role}/layer{curve.layer}", self.name)
            media[tag] = wandb.plot.line_series(
                xs=list(curve.steps),
                ys=[list(head) for head in curve.heads],
                keys=[f"head {h}" for h in range(len(curve.heads))],
                title=titled(f"entropy per head, {curve.role}, layer {curve.layer}", self.name),
                xname="step",
            )
        self._log(media, step)

    def log_attention_sinks(self, rows: Sequence[AttentionSinkRow], step: int) -> None:
        """As a table."""
        import wandb

        table = wandb.Table(columns=list(COLUMNS), data=[list(astuple(row)) for row in rows])
        self._log({renamed("attn_sinks", self.name): table}, step)

    def _log(self, row: Mapping[str, Any], step: int) -> None:
        # Without W&B's own step: it must not go back, and the background thread logs later than training.
        self.run.log({**row, AXIS: step})
