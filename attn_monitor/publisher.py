"""`Publisher`: what happens to a snapshot after capture, off the training thread: archive, pictures, loggers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attn_monitor import drawing, render, sinks
from attn_monitor.background import BackgroundWriter, Failures
from attn_monitor.probe import ProbeBatch
from attn_monitor.snapshot import AttentionSnapshot, snapshot_path


class Publisher:
    """Writes snapshots to an archive folder (None: no archive) and to any number of loggers.

    A logger is a Lightning logger or a plain TensorBoard ``SummaryWriter``. Metrics are logged at once; archiving,
    drawing and picture logging happen on a background thread. Each part fails by itself, see `Failures`.
    """

    def __init__(
        self,
        loggers: Sequence[Any],
        *,
        folder: Path | None = None,
        style: drawing.Style = drawing.Style(),
        failures: Failures | None = None,
    ) -> None:
        self.loggers, self.folder, self.style = list(loggers), folder, style
        self.failures = failures or Failures()
        self.writer = BackgroundWriter()
        self._described = False

    def publish(
        self,
        snapshot: AttentionSnapshot,
        probe: ProbeBatch,
        history: Sequence[AttentionSnapshot] = (),
        *,
        layers: Sequence[int] = (-1,),
    ) -> None:
        """Log a snapshot; ``layers`` are those to draw, ``history`` what the film strips show (this one included)."""
        for logger in self.loggers:
            part = partial(sinks.log_scalars, logger, metrics=snapshot.metrics, step=snapshot.step)
            self.failures.attempt(f"logging metrics to {type(logger).__name__}", part)
        job = partial(self._write, snapshot, probe, list(history) or [snapshot], list(layers))
        self.failures.attempt("the background writer", partial(self._submit, job))

    def drain(self, patience: float | None = None) -> bool:
        """Wait until everything is written; False when that takes more than ``patience`` seconds."""
        return self.writer.drain(patience)

    def close(self) -> None:
        """Write what is left and end the thread."""
        self.writer.close()

    def _submit(self, job: partial[None]) -> None:
        if not self.writer.submit(job):
            raise TimeoutError("a logger is too slow; the pictures of this step are skipped")

    def _write(
        self, snapshot: AttentionSnapshot, probe: ProbeBatch, history: list[AttentionSnapshot], layers: list[int]
    ) -> None:
        attempt = self.failures.attempt
        if self.folder is not None:
            attempt("writing the archive", partial(_archive, self.folder, snapshot, probe))
        if not self._described:
            text = sinks.how_to_read(self.style.threshold, self.style.scale)
            for logger in self.loggers:
                action = partial(sinks.describe_run, logger, text=text, layers=list(snapshot.layers))
                attempt(f"describing the run to {type(logger).__name__}", action)
            self._described = True
        takers = [logger for logger in self.loggers if sinks.takes_pictures(logger)]
        pictures: list[sinks.Picture] = []
        if takers and attempt("drawing", lambda: pictures.extend(self._draw(snapshot, probe, history, layers))):
            for logger in takers:
                action = partial(sinks.log_pictures, logger, pictures=pictures, step=snapshot.step)
                attempt(f"logging pictures to {type(logger).__name__}", action)

    def _draw(
        self, snapshot: AttentionSnapshot, probe: ProbeBatch, history: list[AttentionSnapshot], layers: list[int]
    ) -> list[sinks.Picture]:
        pictures = []
        for index, (name, photo) in enumerate(zip(snapshot.names, probe.pixels, strict=True)):
            truth = None if probe.masks is None else probe.masks[index].numpy()
            for layer in layers:
                suffix = f"/layer{layer}" if len(layers) > 1 else ""
                caption = f"{name}, step {snapshot.step}"
                shown = render.panel(snapshot, index, photo, layer=layer, truth=truth, style=self.style)
                strip = render.filmstrip(history, index, photo, layer=layer, style=self.style)
                pictures.append(sinks.Picture(f"attn_maps/{name}{suffix}", shown, caption))
                pictures.append(sinks.Picture(f"attn_filmstrip/{name}{suffix}", strip, caption))
        return pictures


def _archive(folder: Path, snapshot: AttentionSnapshot, probe: ProbeBatch) -> None:
    if not (folder / "probe.npz").exists():
        probe.save(folder / "probe.npz")
    snapshot.save(snapshot_path(folder, snapshot.step))
