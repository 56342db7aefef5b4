"""`Publisher`: what happens to a snapshot after capture, off the training thread: archive, pictures, loggers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from attn_monitor.draw.options import DrawingOptions
from attn_monitor.measurements import HealthFlag
from attn_monitor.messages import warn
from attn_monitor.player.report import EMBED_BYTES, names_of, report_page, write_whole
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.publish.attention_sinks import AttentionSinkRow, sink_rows
from attn_monitor.publish.background import Job, Outbox, Patience
from attn_monitor.publish.disk_space import Space
from attn_monitor.publish.failures import Failures
from attn_monitor.publish.head_keys import budget_text, head_keys, layers_within
from attn_monitor.publish.how_to_read import how_to_read
from attn_monitor.publish.picture_folder import PictureFolder
from attn_monitor.publish.pictures import Pictures, entropy_curves
from attn_monitor.publish.sink import (
    DefinesAxis,
    DescribesRun,
    KeepsTables,
    Picture,
    PlaysAnimations,
    Sink,
    TakesFlags,
    TakesHistograms,
    TakesOverlays,
    TakesPictures,
    TakesReports,
    TellsAttentionSinks,
)
from attn_monitor.publish.sink_registry import sink_for
from attn_monitor.publish.tags import renamed
from attn_monitor.record.archive import snapshot_path
from attn_monitor.record.curves import Curves
from attn_monitor.record.history import History
from attn_monitor.record.snapshot_file import write_snapshot
from attn_monitor.snapshot import Snapshot

Value = TypeVar("Value")

ARCHIVE = "writing the archive"  # what failures call it


@dataclass
class _Channel:
    """A logger's sink, what it is called, and what waits for it."""

    sink: Sink
    label: str
    outbox: Outbox
    done: set[str] = field(default_factory=set)  # what is done once for each run


class Publisher:
    """Writes snapshots to an archive folder (None: no archive) and to any number of loggers.

    A logger is a Lightning logger, a plain TensorBoard ``SummaryWriter``, a W&B run, or anything with ``log_metrics``.
    The archive and each logger have a queue and a thread of their own, so that one that hangs holds up neither training
    nor the others. Metrics and archive are tried again when they fail and wait in memory, 64 MB for each; pictures are
    left out (CSVLogger, which must not be called from two threads, gets its metrics at once). All waiting together, for
    pictures that are too slow and at the end, takes a run no longer than ``patience`` (a minute). While less than
    ``disk_reserve`` bytes are free (None: the smaller of 1 GB and 1 % of the disk), pictures and archive pause.

    ``every_layer`` draws each captured layer, not only the last. ``history`` are the snapshots of a resumed run's past,
    for film strips, ``curves`` its metrics, for charts. ``settings`` is Markdown that records how the run was watched.
    ``before_writing`` is called before each snapshot is written to the archive, and may keep it from that by raising.
    ``name`` keeps several publishers of one run apart: tags start with ``attn-{name}``; the archive has plain tags.

    On W&B the axis is ``trainer/global_step``; do not pass ``step=`` to ``run.log`` beside it, as W&B drops rows whose
    step is not ahead of those already written, but put ``"trainer/global_step": step`` into your own rows.
    What fails is one warning, and one more when it works again, at the next call of a method, as are health flags;
    whoever passes ``failures`` reports both instead.
    """

    def __init__(
        self,
        loggers: Sequence[Any],
        probe: ProbeBatch,
        *,
        folder: Path | None = None,
        style: DrawingOptions = DrawingOptions(),
        every_layer: bool = False,
        history: Iterable[Snapshot] = (),
        curves: Curves | None = None,
        settings: str = "",
        name: str = "",
        failures: Failures | None = None,
        disk_reserve: int | None = None,
        patience: Patience | None = None,
        before_writing: Callable[[], object] | None = None,
    ) -> None:
        self.folder, self.settings, self._before_writing = folder, settings, before_writing
        self.failures = failures or Failures()
        self._reports = failures is None
        self._probe, self._style, self._name, self._every_layer = probe, style, name, every_layer
        self._pictures, self._history = Pictures(probe, style, name), History(list(history))
        self._curves = Curves() if curves is None else curves.copy()
        self._last: Snapshot | None = None
        self._told: set[HealthFlag] = set()
        self._patience, self._space = patience or Patience(), Space(self.failures, disk_reserve)
        self._archive = Outbox("archive", self.failures, self._patience, patient=True)
        sinks = [(type(logger).__name__, sink_for(logger, name)) for logger in loggers]
        if folder is not None and not loggers:  # then pictures themselves are what a user can look at
            sinks = [("PictureFolder", PictureFolder(folder / "pictures"))]
        self._channels = [
            _Channel(sink, label, Outbox(label, self.failures, self._patience))
            for label, sink in zip(_different([label for label, _ in sinks]), [s for _, s in sinks], strict=True)
        ]

    @property
    def seconds(self) -> float:
        """Time spent behind training so far."""
        return sum(outbox.seconds for outbox in self._outboxes())

    @property
    def archived(self) -> int | None:
        """Step of the last snapshot that was written to the archive; None when there is none."""
        return self._archive.last_step

    def publish(self, snapshot: Snapshot) -> None:
        """Queue a snapshot for the archive and every logger."""
        step, layers = snapshot.step, snapshot.drawn_layers(self._every_layer)
        self._history.add(snapshot, layers)
        self._curves.add(step, snapshot.metrics)
        self._last = snapshot
        self._tell(snapshot.flags, step)
        if self.folder is not None:
            write = partial(self._write, self.folder, snapshot)
            self._archive.put(Job(ARCHIVE, step, write, size=_size(snapshot)))
        every_scalar = self._scalars(snapshot, True)
        drawn = _Once(partial(self._draw, snapshot, list(self._history), self._curves.copy(), layers))
        for channel in self._channels:
            layers_of_heads = self._layers_of_heads(channel, snapshot)
            scalars = every_scalar if layers_of_heads is None else self._scalars(snapshot, layers_of_heads)
            self._queue_metrics(channel, scalars, step)
            if isinstance(channel.sink, TakesPictures):
                log = partial(self._log_pictures, channel, channel.sink, snapshot, drawn, layers[-1])
                channel.outbox.put(Job(f"logging pictures to {channel.label}", step, log, keep=False))
        self._report()

    def tell(self, flags: Sequence[HealthFlag], step: int) -> None:
        """Health flags in words, before the snapshot that they go with: a warning, and to loggers that take them."""
        self._tell(flags, step)
        self._report()

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until everything is written, for a minute at most; False when not everything was."""
        patience = Patience(seconds)
        drained = [outbox.drain(patience) for outbox in self._outboxes()]
        return all(drained)

    def close(self, *, finish: bool = True) -> None:
        """Write what is left, end the threads, and tell what could not be written. Returns whatever the loggers do.

        Before, a time-lapse, a table of attention sinks, on W&B a table and charts of all heads, and a report of the
        archive beside it, which W&B and MLflow get too, unless the run did not ``finish``.
        """
        if finish and self._last is not None:
            history, last = list(self._history), self._last
            gif = _Once(partial(self._pictures.timelapse, history))
            rows = _Once(partial(sink_rows, last, self._curves.copy()))
            for channel in self._channels:
                if isinstance(channel.sink, PlaysAnimations):
                    log = partial(self._log_end, channel, gif, rows, history, last)
                    part = f"logging the end of the run to {channel.label}"
                    channel.outbox.put(Job(part, None, log, keep=False))
            self._report_run(last.step)
        self._last = None
        for outbox in self._outboxes():
            outbox.close()
        self.failures.sum_up()
        self._report()

    def _report_run(self, step: int) -> None:
        """Write a page of all that is in the archive, once that is complete, and hand it to loggers that take it."""
        pages: list[str] = []
        if self.folder is not None:
            write = partial(self._write_report, self.folder, pages)
            self._archive.put(Job("writing the report", None, write, keep=False))
            self._archive.close()
        for channel in self._channels:
            if pages and isinstance(channel.sink, TakesReports):
                log = partial(channel.sink.log_report, renamed("attn_report", self._name), pages[0], step)
                channel.outbox.put(Job(f"logging the report to {channel.label}", None, log, keep=False))

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        """A snapshot to the archive, after its probe."""
        path = folder / "probe.npz"
        missing = not path.exists()
        self._space.require(folder, _size(snapshot) + missing * self._probe.images.nbytes)
        if self._before_writing is not None:
            self._before_writing()
        if missing:
            self._probe.save(path)
        write_snapshot(snapshot, snapshot_path(folder, snapshot.step))

    def _write_report(self, folder: Path, pages: list[str]) -> None:
        if self._archive.last_step is None or self.failures.fails(ARCHIVE):
            return  # why there is no archive is told already
        page = report_page(list(zip(names_of([folder]), [folder], strict=True)), limit=EMBED_BYTES)
        write_whole(folder / "report.html", page, partial(self._space.require, folder))
        pages.append(page)

    def _tell(self, flags: Sequence[HealthFlag], step: int) -> None:
        """Each once."""
        news = [flag for flag in flags if flag not in self._told]
        self._told.update(news)
        for channel in self._channels:
            if news and isinstance(channel.sink, TakesFlags):
                log = partial(channel.sink.log_flags, news, step)
                channel.outbox.put(Job(f"logging health flags to {channel.label}", step, log, keep=False))
        if news:
            self.failures.note("attention health\n" + "\n".join(f"  {flag}" for flag in news))

    def _outboxes(self) -> list[Outbox]:
        return [self._archive, *(channel.outbox for channel in self._channels)]

    def _report(self) -> None:
        if self._reports:
            self.failures.report(_warn)

    def _scalars(self, snapshot: Snapshot, heads: bool | tuple[int, ...]) -> dict[str, float]:
        return {renamed(tag, self._name): value for tag, value in snapshot.scalars(heads=heads).items()}

    def _layers_of_heads(self, channel: _Channel, snapshot: Snapshot) -> tuple[int, ...] | None:
        """The layers whose heads a logger with a budget gets, said once; None where it gets all."""
        budget = channel.sink.head_keys
        if budget is None or head_keys(snapshot).total() <= budget:
            return None
        layers = layers_within(snapshot, budget)
        if "budget" not in channel.done:
            channel.done.add("budget")
            self.failures.note(budget_text(channel.label, layers, snapshot))
        return layers

    def _queue_metrics(self, channel: _Channel, scalars: dict[str, float], step: int) -> None:
        part, log = f"logging metrics to {channel.label}", partial(self._log_metrics, channel, scalars, step)
        if not channel.sink.on_training_thread:
            channel.outbox.put(Job(part, step, log, size=200 * len(scalars)))
        elif not self.failures.attempt(part, log):
            self.failures.lost(part, step)

    def _log_metrics(self, channel: _Channel, scalars: dict[str, float], step: int) -> None:
        if isinstance(channel.sink, DefinesAxis):
            self._do_once(channel, f"defining the axis of {channel.label}", channel.sink.define_axis)
        channel.sink.log_metrics(scalars, step)

    def _log_pictures(
        self,
        channel: _Channel,
        sink: TakesPictures,
        snapshot: Snapshot,
        drawn: _Once[list[Picture]],
        layer: int,
    ) -> None:
        label, step = channel.label, snapshot.step
        if isinstance(sink, DescribesRun):
            text = how_to_read(self._style, self.settings, self._name)
            self._do_once(channel, f"describing the run to {label}", partial(sink.describe_run, text, snapshot))
        pictures = drawn()
        self._space.require(channel.sink.media_folder, channel.sink.stored_bytes(pictures))
        single = {p.tag: partial(sink.log_pictures, [p], step) for p in pictures}
        if channel.sink.pictures_together:
            with suppress(Exception):  # which picture it was that failed is found one by one
                sink.log_pictures(pictures, step)
                single = {}
        self.failures.each(f"logging some pictures to {label}", single, step)
        if isinstance(sink, TakesHistograms):
            self.failures.attempt(f"logging histograms to {label}", partial(sink.log_histograms, snapshot))
        if isinstance(sink, TakesOverlays):
            takes = sink
            self.failures.attempt(
                f"logging overlays to {label}",
                lambda: takes.log_overlays(self._pictures.overlays(snapshot, layer), step),
            )

    def _do_once(self, channel: _Channel, part: str, action: Callable[[], None]) -> None:
        if part not in channel.done and not self.failures.pause(part) and self.failures.attempt(part, action):
            channel.done.add(part)

    def _log_end(
        self,
        channel: _Channel,
        gif: _Once[bytes],
        rows: _Once[list[AttentionSinkRow]],
        history: list[Snapshot],
        last: Snapshot,
    ) -> None:
        sink = channel.sink
        self._space.require(sink.media_folder, 2 * len(gif()))
        if isinstance(sink, PlaysAnimations):
            sink.log_animation(renamed("attn_timelapse", self._name), gif(), last.step)
        if isinstance(sink, TellsAttentionSinks) and rows():
            sink.log_attention_sinks(rows(), last.step)
        if isinstance(sink, KeepsTables):
            sink.log_tables(self._pictures.head_rows(last), entropy_curves(history), last.step)

    def _draw(
        self, snapshot: Snapshot, history: list[Snapshot], curves: Curves, layers: Sequence[int]
    ) -> list[Picture]:
        """Panels and film strips of every image that can be drawn, and charts of the run."""
        pictures: list[Picture] = []

        def draw(index: int) -> None:
            pictures.extend(self._pictures.of_image(index, snapshot, history, layers))

        def draw_run() -> None:
            pictures.extend(self._pictures.of_run(snapshot, curves))

        images = {name: partial(draw, index) for index, name in enumerate(snapshot.names)}
        parts: dict[str, Callable[[], None]] = {**images, "charts of the run": draw_run}
        if not self.failures.attempt(
            "drawing", partial(self.failures.each, "drawing some images", parts, snapshot.step)
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


def _different(labels: Sequence[str]) -> list[str]:
    """Labels, of which the second of a kind and later ones have a number."""
    seen: Counter[str] = Counter()
    numbered = []
    for label in labels:
        seen[label] += 1
        numbered.append(label if seen[label] == 1 else f"{label} {seen[label]}")
    return numbered


def _warn(text: str) -> None:
    # Four calls up is the line that called the publisher.
    warn(f"attn_monitor: {text}", stacklevel=5)


def _size(snapshot: Snapshot) -> int:
    """Bytes of its tensors."""
    return sum(attention.nbytes for attention in snapshot.layers.values())
