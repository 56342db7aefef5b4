"""`Publisher`: what happens to a snapshot after capture, off the training thread: archive, pictures, loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attn_monitor import drawing, render, sinks
from attn_monitor import functional as F
from attn_monitor.background import BackgroundWriter, Failures
from attn_monitor.names import renamed
from attn_monitor.probe import ProbeBatch
from attn_monitor.snapshot import AttentionSnapshot, snapshot_path


class Publisher:
    """Writes snapshots to an archive folder (None: no archive) and to any number of loggers.

    A logger is a Lightning logger, a plain TensorBoard ``SummaryWriter`` or a W&B run. Metrics are logged at once;
    archiving, drawing and picture logging happen on a background thread. Each part fails by itself, see `Failures`.
    On W&B the axis is ``trainer/global_step``; do not pass ``step=`` to ``run.log`` beside it, as W&B drops rows whose
    step is not ahead of those already written, but put ``"trainer/global_step": step`` into your own rows.
    Each failure is one warning, told by ``warn`` at the next call of a method, as are health flags; whoever passes
    ``failures`` reports both instead. ``settings`` is Markdown that records how the run was watched. ``name`` keeps
    several publishers of one run apart: tags start with ``attn-{name}``; the archive has plain tags.
    """

    def __init__(
        self,
        loggers: Sequence[Any],
        *,
        folder: Path | None = None,
        style: drawing.Style = drawing.Style(),
        failures: Failures | None = None,
        warn: Callable[[str], None] | None = None,
        settings: str = "",
        name: str = "",
    ) -> None:
        self.loggers, self.folder, self.style, self.settings = list(loggers), folder, style, settings
        self.name = name
        self.failures = failures or Failures()
        self._tell = None if failures is not None else warn or _warn
        self.writer = BackgroundWriter()
        # Without any logger, the pictures themselves are what a user can look at.
        self.folder_for_pictures = folder / "pictures" if folder is not None and not self.loggers else None
        self._described = self._axes_defined = False

    def publish(
        self,
        snapshot: AttentionSnapshot,
        probe: ProbeBatch,
        history: Sequence[AttentionSnapshot] = (),
        *,
        layers: Sequence[int] = (-1,),
    ) -> None:
        """Log a snapshot; ``layers`` are those to draw, ``history`` what the film strips show (this one included)."""
        self._define_axes()
        metrics = {renamed(tag, self.name): value for tag, value in snapshot.metrics.items()}
        for logger in self.loggers:
            part = partial(sinks.log_scalars, logger, metrics=metrics, step=snapshot.step)
            self.failures.attempt(f"logging metrics to {type(logger).__name__}", part)
            if snapshot.flags:
                tell = partial(sinks.log_flags, logger, flags=snapshot.flags, step=snapshot.step, name=self.name)
                self.failures.attempt(f"logging health flags to {type(logger).__name__}", tell)
        if snapshot.flags:
            self.failures.note("attention health\n" + "\n".join(f"  {flag}" for flag in snapshot.flags))
        job = partial(self._write, snapshot, probe, list(history) or [snapshot], list(layers))
        self.failures.attempt("the background writer", partial(self._submit, job))
        self._report()

    def drain(self, patience: float | None = None) -> bool:
        """Wait until everything is written; False when that takes more than ``patience`` seconds."""
        return self.writer.drain(patience)

    def close(self) -> None:
        """Write what is left and end the thread."""
        self.writer.close()
        self._report()

    def _report(self) -> None:
        if self._tell is not None:
            self.failures.report(self._tell)

    def _define_axes(self) -> None:
        if self._axes_defined:
            return
        self._axes_defined = True
        for logger in self.loggers:
            action = partial(sinks.define_axis, logger)
            self.failures.attempt(f"defining the axis of {type(logger).__name__}", action)

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
            text = sinks.how_to_read(self.style.threshold, self.style.scale, self.settings, self.name)
            for logger in self.loggers:
                action = partial(sinks.describe_run, logger, text=text, snapshot=snapshot, name=self.name)
                attempt(f"describing the run to {type(logger).__name__}", action)
            self._described = True
        takers = [logger for logger in self.loggers if sinks.takes_pictures(logger)]
        pictures: list[sinks.Picture] = []
        wanted = takers or self.folder_for_pictures is not None
        if wanted and attempt("drawing", lambda: pictures.extend(self._draw(snapshot, probe, history, layers))):
            for logger in takers:
                name = type(logger).__name__
                attempt(
                    f"logging pictures to {name}", partial(self._log, logger, snapshot, probe, pictures, layers[-1])
                )
            if self.folder_for_pictures is not None:
                attempt("writing pictures", partial(_save_pictures, self.folder_for_pictures, pictures))

    def _log(
        self,
        logger: Any,
        snapshot: AttentionSnapshot,
        probe: ProbeBatch,
        pictures: list[sinks.Picture],
        layer: int,
    ) -> None:
        sinks.log_pictures(logger, pictures=pictures, step=snapshot.step)
        sinks.log_histograms(logger, snapshot=snapshot, name=self.name)
        if sinks.kind_of(logger) == "wandb":
            overlays = [
                replace(o, tag=renamed(o.tag, self.name))
                for o in _overlays(snapshot, probe, layer, self.style.threshold)
            ]
            sinks.log_overlays(logger, overlays=overlays, step=snapshot.step)

    def finish(self, probe: ProbeBatch, history: Sequence[AttentionSnapshot], last: AttentionSnapshot) -> None:
        """At the end of a run: a time-lapse, and on W&B a table and charts of all heads. Waits until all is written."""
        job = partial(self._finish, probe, list(history), last)
        self.failures.attempt("the background writer", partial(self._submit, job))
        self.drain()
        self._report()

    def _finish(self, probe: ProbeBatch, history: list[AttentionSnapshot], last: AttentionSnapshot) -> None:
        takers = [logger for logger in self.loggers if sinks.takes_pictures(logger)]
        gif: list[bytes] = []
        draw = partial(_timelapse, history, probe, self.style)
        if takers and self.failures.attempt("drawing the time-lapse", lambda: gif.append(draw())):
            for logger in takers:
                action = partial(_log_end, logger, gif[0], probe, history, last, self.style, self.name)
                self.failures.attempt(f"logging the end of the run to {type(logger).__name__}", action)

    def _draw(
        self, snapshot: AttentionSnapshot, probe: ProbeBatch, history: list[AttentionSnapshot], layers: list[int]
    ) -> list[sinks.Picture]:
        pictures = []
        for index, (name, photo) in enumerate(zip(snapshot.names, probe.pixels, strict=True)):
            truth = None if probe.masks is None else probe.masks[index].numpy()
            for layer in layers:
                suffix = f"/layer{layer}" if len(layers) > 1 else ""
                caption = f"{name}, step {snapshot.step}"
                shown = render.panel(
                    snapshot, index, photo, layer=layer, truth=truth, caption=probe.caption, style=self.style
                )
                strip = render.filmstrip(history, index, photo, layer=layer, style=self.style)
                pictures.append(sinks.Picture(renamed(f"attn_maps/{name}{suffix}", self.name), shown, caption))
                pictures.append(sinks.Picture(renamed(f"attn_filmstrip/{name}{suffix}", self.name), strip, caption))
        return pictures


def _warn(text: str) -> None:
    # Four calls up is the line that called the publisher.
    warnings.warn(f"attn_monitor: {text}", stacklevel=5)


def _archive(folder: Path, snapshot: AttentionSnapshot, probe: ProbeBatch) -> None:
    if not (folder / "probe.npz").exists():
        probe.save(folder / "probe.npz")
    snapshot.save(snapshot_path(folder, snapshot.step))


def _save_pictures(folder: Path, pictures: Sequence[sinks.Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.tag.replace('/', '-')}.jpg").write_bytes(picture.jpeg)


def _overlays(
    snapshot: AttentionSnapshot, probe: ProbeBatch, layer: int, threshold: float, images: int = 2
) -> list[sinks.Overlay]:
    """Mass masks of every head of the last role, for the first few images, to be switched on and off."""
    role = snapshot.roles[-1]
    maps = snapshot.maps(role, layer)
    masks = F.mass_mask(maps.flatten(-2), threshold).unflatten(-1, maps.shape[-2:])
    overlays = []
    for image, photo in enumerate(probe.pixels[:images]):
        enlarged = torch.nn.functional.interpolate(masks[image][None].float(), photo.shape[:2]).numpy()[0]
        layers = {f"head {head}": mask for head, mask in enumerate(enlarged)}
        overlays.append(sinks.Overlay(f"attn_overlay/{snapshot.names[image]}", photo, layers))
    return overlays


def _timelapse(history: Sequence[AttentionSnapshot], probe: ProbeBatch, style: drawing.Style) -> bytes:
    return drawing.gif(render.timelapse(history, list(probe.pixels), style=style))


def _log_end(
    logger: Any,
    gif: bytes,
    probe: ProbeBatch,
    history: Sequence[AttentionSnapshot],
    last: AttentionSnapshot,
    style: drawing.Style,
    name: str,
) -> None:
    sinks.log_animation(logger, tag=renamed("attn_timelapse", name), gif=gif, step=last.step)
    if sinks.kind_of(logger) != "wandb":
        return
    thumbnails = {}
    for role in last.roles:
        attention = last.layer(role)
        for image, photo in enumerate(probe.pixels):
            shown = drawing.Cells(photo, attention.grid, style, 64).draw(attention.maps[image].numpy())
            thumbnails.update({(role, attention.layer, image, head): cell for head, cell in enumerate(shown)})
    entropies: dict[tuple[str, int], dict[int, list[float]]] = {}
    for snapshot in history:
        for key, attention in snapshot.layers.items():
            values = F.entropy(attention.maps.flatten(-2)).mean(0).tolist()
            entropies.setdefault(key, {})[snapshot.step] = values
    sinks.log_summary(logger, snapshot=last, thumbnails=thumbnails, entropies=entropies, name=name)
