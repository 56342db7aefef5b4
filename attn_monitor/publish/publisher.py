"""`Publisher`: what happens to a snapshot after capture, off the training thread: archive, pictures, loggers."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from attn_monitor import functional as F
from attn_monitor.draw import canvas as drawing
from attn_monitor.draw import panels as render
from attn_monitor.publish import sinks
from attn_monitor.publish.background import Job, Outbox, Patience
from attn_monitor.publish.disk_space import Space
from attn_monitor.publish.failures import Failures
from attn_monitor.publish.tags import renamed
from attn_monitor.record.archive import snapshot_path
from attn_monitor.record.probe import ProbeBatch
from attn_monitor.record.snapshot import AttentionSnapshot

Value = TypeVar("Value")


@dataclass
class _Channel:
    """A logger, what it is called, and what waits for it."""

    logger: Any
    label: str
    outbox: Outbox
    done: set[str] = field(default_factory=set)  # what is done once for each run


class Publisher:
    """Writes snapshots to an archive folder (None: no archive) and to any number of loggers.

    A logger is a Lightning logger, a plain TensorBoard ``SummaryWriter`` or a W&B run. The archive and each logger
    have a queue and a thread of their own, so that one that hangs holds up neither training nor the others. Metrics
    and archive are tried again when they fail and wait in memory, 64 MB for each; pictures are left out (CSVLogger,
    which must not be called from two threads, gets its metrics at once). All waiting together, for pictures that are
    too slow and at the end, takes a run no longer than ``patience`` (a minute). While less than ``disk_reserve`` bytes
    are free (None: the smaller of 1 GB and 1 % of the disk), pictures and archive pause.

    On W&B the axis is ``trainer/global_step``; do not pass ``step=`` to ``run.log`` beside it, as W&B drops rows whose
    step is not ahead of those already written, but put ``"trainer/global_step": step`` into your own rows.
    What fails is one warning, and one more when it works again, told by ``warn`` at the next call of a method, as are
    health flags; whoever passes ``failures`` reports both instead. ``settings`` is Markdown that records how the run
    was watched. ``name`` keeps several publishers of one run apart: tags start with ``attn-{name}``; the archive has
    plain tags.
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
        disk_reserve: int | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.loggers, self.folder, self.style, self.settings = list(loggers), folder, style, settings
        self.name = name
        self.failures = failures or Failures()
        self._tell = None if failures is not None else warn or _warn
        self._patience, self._space = patience or Patience(), Space(self.failures, disk_reserve)
        self._archive = Outbox("archive", self.failures, self._patience, patient=True)
        self._channels: list[_Channel] = []
        seen: Counter[str] = Counter()
        # Without any logger, the pictures themselves are what a user can look at.
        instead = [sinks.PictureFolder(folder / "pictures")] if folder is not None and not self.loggers else []
        for logger in [*self.loggers, *instead]:
            kind = type(logger).__name__
            seen[kind] += 1
            label = kind if seen[kind] == 1 else f"{kind} {seen[kind]}"
            self._channels.append(_Channel(logger, label, Outbox(label, self.failures, self._patience)))

    @property
    def seconds(self) -> float:
        """Time spent behind training so far."""
        return self._archive.seconds + sum(channel.outbox.seconds for channel in self._channels)

    @property
    def archived(self) -> int | None:
        """Step of the last snapshot that was written to the archive; None when there is none."""
        return self._archive.last_step

    def publish(
        self,
        snapshot: AttentionSnapshot,
        probe: ProbeBatch,
        history: Sequence[AttentionSnapshot] = (),
        *,
        layers: Sequence[int] = (-1,),
    ) -> None:
        """Log a snapshot; ``layers`` are those to draw, ``history`` what the film strips show (this one included)."""
        step, past = snapshot.step, list(history) or [snapshot]
        if self.folder is not None:
            write = partial(_write, self._space, self.folder, snapshot, probe)
            self._archive.put(Job("writing the archive", step, write, size=_size(snapshot)))
        metrics = {renamed(tag, self.name): value for tag, value in snapshot.metrics.items()}
        drawn = _Once(partial(self._draw, snapshot, probe, past, list(layers)))
        for channel in self._channels:
            log = partial(self._log_metrics, channel, metrics, step)
            part = f"logging metrics to {channel.label}"
            if sinks.is_bound_to_its_thread(channel.logger):
                if not self.failures.attempt(part, log):
                    self.failures.lost(part, step)
            else:
                channel.outbox.put(Job(part, step, log, size=200 * len(metrics)))
            if not sinks.takes_pictures(channel.logger):
                continue
            if snapshot.flags:
                tell = partial(sinks.log_flags, channel.logger, flags=snapshot.flags, step=step, name=self.name)
                channel.outbox.put(Job(f"logging health flags to {channel.label}", step, tell, keep=False))
            log = partial(self._log_pictures, channel, snapshot, probe, drawn, layers[-1])
            channel.outbox.put(Job(f"logging pictures to {channel.label}", step, log, keep=False))
        if snapshot.flags:
            self.failures.note("attention health\n" + "\n".join(f"  {flag}" for flag in snapshot.flags))
        self._report()

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until everything is written, for a minute at most; False when not everything was."""
        patience = Patience(seconds)
        drained = [outbox.drain(patience) for outbox in self._outboxes()]
        return all(drained)

    def finish(self, probe: ProbeBatch, history: Sequence[AttentionSnapshot], last: AttentionSnapshot) -> None:
        """At the end of a run: a time-lapse, and on W&B a table and charts of all heads. Then as `close`."""
        gif = _Once(partial(_timelapse, list(history), probe, self.style))
        for channel in self._channels:
            if sinks.plays_animations(channel.logger):
                log = partial(self._log_end, channel.logger, gif, probe, list(history), last)
                part = f"logging the end of the run to {channel.label}"
                channel.outbox.put(Job(part, None, log, keep=False))
        self._close()
        self._report()

    def close(self) -> None:
        """Write what is left, end the threads, and tell what could not be written. Returns whatever the loggers do."""
        self._close()
        self._report()

    def _outboxes(self) -> list[Outbox]:
        return [self._archive, *(channel.outbox for channel in self._channels)]

    def _close(self) -> None:
        for outbox in self._outboxes():
            outbox.close()
        self.failures.sum_up()

    def _report(self) -> None:
        if self._tell is not None:
            self.failures.report(self._tell)

    def _log_metrics(self, channel: _Channel, metrics: dict[str, float], step: int) -> None:
        self._do_once(channel, f"defining the axis of {channel.label}", partial(sinks.define_axis, channel.logger))
        sinks.log_scalars(channel.logger, metrics=metrics, step=step)

    def _log_pictures(
        self,
        channel: _Channel,
        snapshot: AttentionSnapshot,
        probe: ProbeBatch,
        drawn: _Once[list[sinks.Picture]],
        layer: int,
    ) -> None:
        logger, label, step = channel.logger, channel.label, snapshot.step
        text = sinks.how_to_read(self.style.threshold, self.style.scale, self.settings, self.name)
        describe = partial(sinks.describe_run, logger, text=text, snapshot=snapshot, name=self.name)
        self._do_once(channel, f"describing the run to {label}", describe)
        pictures = drawn()
        self._space.require(sinks.folder_of(logger), sinks.size_of(logger, pictures))
        single = {p.tag: partial(sinks.log_pictures, logger, pictures=[p], step=step) for p in pictures}
        if sinks.kind_of(logger) == "wandb":
            with suppress(Exception):  # which picture it was that failed is found one by one
                sinks.log_pictures(logger, pictures=pictures, step=step)  # as one row
                single = {}
        self.failures.each(f"logging some pictures to {label}", single, step)
        histograms = partial(sinks.log_histograms, logger, snapshot=snapshot, name=self.name)
        self.failures.attempt(f"logging histograms to {label}", histograms)
        self.failures.attempt(
            f"logging overlays to {label}", partial(self._log_overlays, logger, snapshot, probe, layer)
        )

    def _log_overlays(self, logger: Any, snapshot: AttentionSnapshot, probe: ProbeBatch, layer: int) -> None:
        if sinks.kind_of(logger) == "wandb":
            overlays = [
                replace(o, tag=renamed(o.tag, self.name))
                for o in _overlays(snapshot, probe, layer, self.style.threshold)
            ]
            sinks.log_overlays(logger, overlays=overlays, step=snapshot.step)

    def _do_once(self, channel: _Channel, part: str, action: Callable[[], None]) -> None:
        if part not in channel.done and not self.failures.pause(part) and self.failures.attempt(part, action):
            channel.done.add(part)

    def _log_end(
        self,
        logger: Any,
        gif: _Once[bytes],
        probe: ProbeBatch,
        history: Sequence[AttentionSnapshot],
        last: AttentionSnapshot,
    ) -> None:
        self._space.require(sinks.folder_of(logger), 2 * len(gif()))
        sinks.log_animation(logger, tag=renamed("attn_timelapse", self.name), gif=gif(), step=last.step)
        if sinks.kind_of(logger) == "wandb":
            _log_summary(logger, probe, history, last, self.style, self.name)

    def _draw(
        self, snapshot: AttentionSnapshot, probe: ProbeBatch, history: list[AttentionSnapshot], layers: list[int]
    ) -> list[sinks.Picture]:
        """Panels and film strips of every image that can be drawn."""
        pictures: list[sinks.Picture] = []

        def draw(index: int) -> None:
            name, photo = snapshot.names[index], probe.pixels[index]
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

        images = {name: partial(draw, index) for index, name in enumerate(snapshot.names)}
        if not self.failures.attempt(
            "drawing", partial(self.failures.each, "drawing some images", images, snapshot.step)
        ):
            self.failures.lost("drawing", snapshot.step)
        return pictures


class _Once(Generic[Value]):
    """What a function gives: called by whichever logger comes first, for all."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: list[Value] = []

    def __call__(self) -> Value:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


def _warn(text: str) -> None:
    # Four calls up is the line that called the publisher.
    warnings.warn(f"attn_monitor: {text}", stacklevel=5)


def _write(space: Space, folder: Path, snapshot: AttentionSnapshot, probe: ProbeBatch) -> None:
    """A snapshot to the archive, after its probe."""
    path = folder / "probe.npz"
    missing = not path.exists()
    space.require(folder, _size(snapshot) + missing * probe.images.nbytes)
    if missing:
        probe.save(path)
    snapshot.save(snapshot_path(folder, snapshot.step))


def _size(snapshot: AttentionSnapshot) -> int:
    """Bytes of its tensors."""
    return sum(attention.nbytes for attention in snapshot.layers.values())


def _overlays(
    snapshot: AttentionSnapshot, probe: ProbeBatch, layer: int, threshold: float, images: int = 2
) -> list[sinks.Overlay]:
    """Mass masks of every head of the last role, for the first few images, to be switched on and off."""
    role = snapshot.roles[-1]
    maps = snapshot.maps(role, layer)
    masks = render.shown_masks(maps, threshold)
    overlays = []
    for image, photo in enumerate(probe.pixels[:images]):
        enlarged = torch.nn.functional.interpolate(masks[image][None].float(), photo.shape[:2]).numpy()[0]
        layers = {f"head {head}": mask for head, mask in enumerate(enlarged)}
        overlays.append(sinks.Overlay(f"attn_overlay/{snapshot.names[image]}", photo, layers))
    return overlays


def _timelapse(history: Sequence[AttentionSnapshot], probe: ProbeBatch, style: drawing.Style) -> bytes:
    return drawing.gif(render.timelapse(history, list(probe.pixels), style=style))


def _log_summary(
    logger: Any,
    probe: ProbeBatch,
    history: Sequence[AttentionSnapshot],
    last: AttentionSnapshot,
    style: drawing.Style,
    name: str,
) -> None:
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
    sinks.log_summary(
        logger, snapshot=last, thumbnails=thumbnails, entropies=entropies, threshold=style.threshold, name=name
    )
