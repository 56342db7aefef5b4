"""`Publisher`: write snapshots to the archive and to trackers, in the background of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from attn_monitor.background.disk_reserve import check_reserve, require_space
from attn_monitor.background.failures import Failures
from attn_monitor.background.job_queue import Job, JobQueue
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.draw.history import Entry, History
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.measurements import HEALTH_TAG, HealthFlag
from attn_monitor.messages import warn
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.archive import snapshot_path
from attn_monitor.record.curves import Curves
from attn_monitor.record.snapshot_file import write_snapshot
from attn_monitor.snapshot import Snapshot
from attn_monitor.trackers.destination import Destination
from attn_monitor.trackers.events import Event, Page, Scalars
from attn_monitor.trackers.head_budget import budget_text, head_keys, layers_within
from attn_monitor.trackers.picture_folder import PictureFolder
from attn_monitor.trackers.picture_plan import KEEP, PicturePlan
from attn_monitor.trackers.registry import tracker_for
from attn_monitor.trackers.snapshot_events import events_at_end, events_at_snapshot, events_at_start, events_of_flags
from attn_monitor.trackers.tracker import Tracker

ARCHIVE = "writing the archive"  # the part's name in `Failures`
DRAWN = 4  # latest snapshots; their drawings, some 50 MB each, are kept for slower trackers

Heads = Literal["pictures", "curves"]
"""Where the metrics of single heads are shown."""

WriteReport = Callable[[Path, Callable[[int], object]], tuple[Path, str]]
"""Write a page of an archive's folder after calling a function with its size in bytes; return its path and the page."""


class Publisher:
    """Write snapshots to an archive folder and to any number of loggers.

    A logger is a Lightning logger, a plain TensorBoard ``SummaryWriter``, a W&B run, or anything with ``log_metrics``.
    The archive and each logger have a queue and a thread of their own, so that one that hangs holds up neither training
    nor the others. Metrics and archive are retried when they fail and wait in memory, 64 MB for each; pictures are
    dropped (CSVLogger, which must not be called from two threads, gets its metrics at once).

    On W&B the axis is ``trainer/global_step``; do not pass ``step=`` to ``run.log`` beside it, as W&B drops rows whose
    step is not ahead of those already written, but put ``"trainer/global_step": step`` into your own rows.

    Args:
        loggers: where to log. Without any, the latest pictures are files in ``folder``.
        probe: the images.
        folder: the archive's folder; None writes no archive.
        style: how to draw pictures.
        every_layer: whether to draw each captured layer, or the last one only.
        history: the run's past for film strips, to which a monitor has added each snapshot before it is published; None
            is a past of the publisher's own.
        curves: the run's past for charts, of the same monitor.
        settings: Markdown that records how the run is watched.
        name: distinguishes several publishers of one run by tags such as ``attn-{name}/…``; the archive has plain tags.
        failures: records failures for the caller to report; None warns at the next call of a method.
        disk_reserve: bytes; while less is free on a disk, pictures and archive pause. None is the smaller of 1 GB and
            1 % of the disk.
        budget: how long closing may take; None is a minute.
        before_writing: called before each snapshot is written to the archive, which an exception prevents.
        write_report: writes a page of the complete archive at the end, also for trackers; None writes no page.
        heads: "curves" logs the metrics of single heads as curves; "pictures" leaves them to pictures and the archive.
        keep_pictures: how many snapshots get pictures in loggers, see `PicturePlan`; None is all.
        expected: how many snapshots the run takes at most, None if it is unknown.
    """

    def __init__(
        self,
        loggers: Sequence[Any],
        probe: ProbeBatch,
        *,
        folder: Path | None = None,
        style: DrawingOptions = DrawingOptions(),
        every_layer: bool = False,
        history: History | None = None,
        curves: Curves | None = None,
        settings: str = "",
        name: str = "",
        failures: Failures | None = None,
        disk_reserve: int | None = None,
        budget: WaitBudget | None = None,
        before_writing: Callable[[], object] | None = None,
        write_report: WriteReport | None = None,
        heads: Heads = "pictures",
        keep_pictures: int | None = KEEP,
        expected: float | None = None,
    ) -> None:
        self.folder, self.failures = folder, failures or Failures()
        self._reports = failures is None
        self._probe, self._style, self._every_layer = probe, style, every_layer
        self._history, self._curves = History() if history is None else history, Curves() if curves is None else curves
        self._fills_past = history is None
        # A path in it may hold bytes that are no UTF-8, which trackers cannot store.
        self._settings = settings.encode("utf-8", "backslashreplace").decode()
        self._name, self._reserve = name, check_reserve(disk_reserve)
        self._before_writing, self._write_report = before_writing, write_report
        self.report: Path | None = None  # the page, once it is written
        self._heads, self._plan = heads, PicturePlan(keep_pictures, expected)
        self._last: Snapshot | None = None
        self._written: set[int] = set()  # steps in the archive
        self._drawn: deque[Sequence[Event[Any]]] = deque()
        budget = budget or WaitBudget()
        self._archive = JobQueue("archive", self.failures, budget, persistent=True)
        trackers: list[Tracker] = [tracker_for(logger) for logger in loggers]
        if folder is not None and not loggers:  # so that the user has pictures to look at
            trackers = [PictureFolder(folder / "pictures")]
        kinds = [tracker.label for tracker in trackers]
        self._destinations = [
            Destination(tracker, f"{kind} {number}" if number > 1 else kind, self.failures, budget, self._reserve)
            for tracker, kind, number in zip(trackers, kinds, _numbers(kinds), strict=True)
        ]

    @property
    def seconds(self) -> float:
        """Return the seconds spent in the background so far."""
        return sum(queue.seconds for queue in self._queues())

    @property
    def archived(self) -> int | None:
        """Return the step of the last snapshot in the archive, None if there is none."""
        return self._archive.last_step

    def publish(self, snapshot: Snapshot) -> None:
        """Queue a snapshot for the archive and every logger."""
        step, layers = snapshot.step, snapshot.drawn_layers(self._every_layer)
        if self._fills_past:
            self._history.add(snapshot, layers)
            self._curves.add(step, snapshot.metrics)
        if self._last is None:
            start = self._style, self._settings, self._name
            for destination in self._destinations:
                events = self._named(events_at_start(snapshot, *start, heads=self._heads == "curves"))
                destination.first = [event for event in events if type(event) in destination.tracker.methods]
        self._last = snapshot
        self._alert(snapshot.flags, step)
        if self.folder is not None:
            write = partial(self._write, self.folder, snapshot, self._history.entries[-1])
            self._archive.put(Job(ARCHIVE, step, write, size=_size(snapshot)))
        past = list(self._history.entries), self._curves.copy()
        events = self._named(events_at_snapshot(snapshot, *past, self._probe, self._style, layers))
        pictures = self._plan.take(events, step)
        self._drawn.append(pictures)
        if len(self._drawn) > DRAWN:
            for event in self._drawn.popleft():
                event.forget()
        entry = self._history.entries[-1]
        late = Scalars("attn", partial(_metrics_of_patches, entry)).named(self._name)
        for destination in self._destinations:
            destination.log_late()
            destination.put_scalars(self._scalars(destination, snapshot), step)
            if entry.adds_metrics:
                destination.put_late(late, partial(getattr, entry, "is_settled"), step)
            destination.put("pictures", pictures, step, step)
        self._report()

    def alert(self, flags: Sequence[HealthFlag], step: int) -> None:
        """Report health flags before their snapshot, as a warning and to loggers that take them."""
        self._alert(flags, step)
        self._report()

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until everything is written; False if not everything is after ``seconds`` (None is a minute)."""
        budget = WaitBudget(seconds)
        drained = [queue.drain(budget) for queue in self._queues()]
        return all(drained)

    def close(self, *, finish: bool = True) -> None:
        """Write what is left, end the threads, and report what could not be written, whatever the loggers do.

        Args:
            finish: whether the run is complete, so that a time-lapse, tables, charts and the report are logged first.
        """
        if finish and self._last is not None:
            past = list(self._history), self._curves.copy()
            events = self._named(events_at_end(self._last, *past, self._probe, self._style))
            held = self._plan.rest()
            for destination in self._destinations:
                destination.put("pictures", held, self._last.step, self._last.step)
                destination.put("the end of the run", events, self._last.step, None)
            self._put_report(self._last.step)
        self._last = None
        self._drawn.clear()
        for queue in self._queues():
            queue.close()
        for destination in self._destinations:
            destination.log_late(unknown=finish)
        self.failures.sum_up()
        self._report()

    def _put_report(self, step: int) -> None:
        """Write a page of the complete archive, and log it to trackers that take pages."""
        pages: list[str] = []

        def write(folder: Path, write_report: WriteReport) -> None:
            if self._archive.last_step is not None and not self.failures.fails(ARCHIVE):  # otherwise already reported
                self.report, page = write_report(folder, lambda size: require_space(folder, size, self._reserve))
                pages.append(page)

        if self.folder is not None and self._write_report is not None:
            action = partial(write, self.folder, self._write_report)
            self._archive.put(Job("writing the report", None, action, retry=False))
            self._archive.close()
        for page in self._named([Page("attn_report", partial(str, text)) for text in pages]):
            for destination in self._destinations:
                destination.put("the report", [page], step, None)

    def _write(self, folder: Path, snapshot: Snapshot, entry: Entry) -> None:
        """Write a snapshot to the archive, and first the probe if it is missing."""
        path = folder / "probe.npz"
        missing = not path.exists()
        require_space(folder, _size(snapshot) + missing * self._probe.images.nbytes, self._reserve)
        if self._before_writing is not None:
            self._before_writing()
        if missing:
            self._probe.save(path)
        write_snapshot(snapshot.with_colors(entry.colored()), snapshot_path(folder, snapshot.step))
        if missing:
            self._report_deleted(folder)
        self._written.add(snapshot.step)

    def _report_deleted(self, folder: Path) -> None:
        """Report the steps that are lost as the archive was deleted in mid-run."""
        gone = {step for step in self._written if not snapshot_path(folder, step).exists()}
        self._written -= gone
        if gone:
            self.failures.failed(ARCHIVE, FileNotFoundError(f"{folder} was deleted in mid-run, with what it held"))
        for step in sorted(gone):
            self.failures.lost(ARCHIVE, step)

    def _alert(self, flags: Sequence[HealthFlag], step: int) -> None:
        """Report each flag once."""
        news = [flag for flag in flags if self.failures.is_new(flag)]
        if news:
            for destination in self._destinations:
                destination.put("health flags", self._named(events_of_flags(news)), step, step)
            self.failures.note("attention health\n" + "\n".join(f"  {flag}" for flag in news))

    def _named(self, events: Iterable[Event[Any]]) -> list[Event[Any]]:
        """Add the publisher's name to tags; no other place does."""
        return [event.named(self._name) for event in events]

    def _scalars(self, destination: Destination, snapshot: Snapshot) -> Scalars:
        """Return the metrics; heads where they are wanted, for a tracker with a budget of fewer layers."""
        if self._heads != "curves":
            return Scalars("attn", partial(snapshot.scalars, heads=False)).named(self._name)
        budget = destination.tracker.head_keys
        if budget is None or head_keys(snapshot).total() <= budget:
            return Scalars("attn", snapshot.scalars).named(self._name)
        layers = layers_within(snapshot, budget)
        if self.failures.is_new(("budget", destination.label)):
            self.failures.note(budget_text(destination.label, layers, snapshot))
        return Scalars("attn", partial(snapshot.scalars, heads=layers)).named(self._name)

    def _queues(self) -> list[JobQueue]:
        return [self._archive, *(destination.queue for destination in self._destinations)]

    def _report(self) -> None:
        if self._reports:
            self.failures.report(_warn)


def _metrics_of_patches(entry: Entry) -> dict[str, float]:
    """Return the metrics that an entry of the history adds to its snapshot, by tag."""
    values = entry.colored().scalars()
    del values[HEALTH_TAG]  # which the snapshot has logged
    return values


def _numbers(labels: Sequence[str]) -> list[int]:
    """Number equal labels in order, from 1 on."""
    return [labels[: index + 1].count(label) for index, label in enumerate(labels)]


def _warn(text: str) -> None:
    # The line that called the publisher is four calls up.
    warn(f"attn_monitor: {text}", stacklevel=5)


def _size(snapshot: Snapshot) -> int:
    """Return the bytes of a snapshot's tensors."""
    return sum(attention.nbytes for attention in snapshot.layers.values())
