"""`RunOutput`: where one run writes, which is its archive and its loggers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attn_monitor.background import wait_budget
from attn_monitor.background.failures import Failures
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.distributed import RankZero
from attn_monitor.measurements import HealthFlag
from attn_monitor.player.report import write_report
from attn_monitor.record.archive import snapshots_between
from attn_monitor.record.folder_claim import Claim
from attn_monitor.record.snapshot_file import stored_bytes
from attn_monitor.snapshot import Snapshot
from attn_monitor.trackers.publisher import Publisher
from attn_monitor.train import reports
from attn_monitor.train.archive_folder import ArchiveId, claim_archive, release, tidy
from attn_monitor.train.cost import Cost
from attn_monitor.train.kept import Kept


class RunOutput:
    """Open a run's archive and its loggers on rank zero, and write its snapshots there. Arguments are `Run`'s."""

    def __init__(
        self,
        kept: Kept,
        rank_zero: RankZero,
        failures: Failures,
        budget: WaitBudget,
        *,
        name: str,
        warn: Callable[[str], None],
        inform: Callable[[str], None],
    ) -> None:
        self._kept, self._rank_zero, self._failures, self._budget = kept, rank_zero, failures, budget
        self._name, self._warn, self._inform = name, warn, inform
        self.opened = False
        self.folder: Path | None = None  # of the archive
        self.publisher: Publisher | None = None  # on rank zero, from the first snapshot on
        self._loggers: list[Any] = []
        self._claim: Claim | None = None  # rank zero's lock on the archive
        self._held: Callable[[], None] | None = None  # publishes a snapshot

    @property
    def takes_flags(self) -> bool:
        """Whether there is a snapshot that flags can be reported with."""
        return self.publisher is not None or self._held is not None

    def open(
        self, loggers: Sequence[Any], folder: Path | None, *, number: int = 1, step: int, until: int | None = None
    ) -> None:
        """Lock the archive's folder, and read the snapshots that were written after the checkpoint of a resumed run.

        Args:
            loggers: the run's loggers.
            folder: of the archive; None for no archive.
            number: which of the numbered folders to try first, see `claim_archive`.
            step: optimizer steps done; later snapshots in the archive are moved aside.
            until: the last step to read, which need not be taken again; None is ``step``.
        """
        self.opened, self._loggers = True, list(loggers)
        if folder is not None:
            claim = partial(self._open_archive, folder, number, step)
            self.folder = self._failures.result_of("opening the archive", lambda: self._rank_zero.run(claim))
        if text := reports.ignored_text(loggers):
            self._inform(text)
        for snapshot in self._rank_zero.run(lambda: self._written_since(step if until is None else until)):
            self._kept.remember(snapshot)

    def hold(self, snapshot: Snapshot, paths: Mapping[str, str], seconds: float, note: str) -> None:
        """Keep a snapshot, which took these seconds, until `publish`; ``note`` says what was not found."""
        self._held = partial(self._publish, snapshot, paths, seconds, note)

    def publish(self, findings: Sequence[HealthFlag]) -> None:
        """Queue the snapshot that is held, if any, with flags that were found since it was taken."""
        held, self._held = self._held, None
        if held is not None:
            held()
            self.alert(findings, self._kept.schedule.last_step or 0)

    def drop(self) -> None:
        """Drop the snapshot that is held."""
        self._held = None

    def alert(self, flags: Sequence[HealthFlag], step: int) -> None:
        """Report health flags before their snapshot."""
        if self.publisher is not None:
            self.publisher.alert(flags, step)

    def close(self, cost: Cost) -> None:
        """Write everything, and report what watching has cost and found."""
        if self.publisher is not None:
            ended, monitor = time.perf_counter(), self._kept.monitor
            self.publisher.close()
            self._inform(cost.text(time.perf_counter() - ended, self.publisher.seconds))
            last = None if monitor is None else monitor.previous
            flags = [] if monitor is None else monitor.health.flags
            self._inform(reports.health_text(flags, None if last is None else last.verdict))
            if self.folder is not None and self.publisher.archived is not None:
                # The last line is the one to click.
                self._inform(reports.where_text(self.folder, self.publisher.report))

    def abort(self) -> None:
        """After an exception, write what was captured for a few seconds."""
        self._budget.limit(wait_budget.EXCEPTION_SECONDS)
        if self.publisher is not None:
            self.publisher.close(finish=False)

    def report_end(self) -> None:
        """Report the last step in the archive of a run that was ended by an exception."""
        if self.publisher is not None and self.folder is not None and self.publisher.archived is not None:
            self._inform(f"the archive in {self.folder} ends with step {self.publisher.archived}")

    def end(self) -> None:
        """Release threads and the folder's lock."""
        if self.publisher is not None:
            self.publisher.close(finish=False)
        if self._claim is not None:
            release(self._claim)
        self._claim = None

    def _open_archive(self, folder: Path, number: int, step: int) -> Path:
        claim, continued = claim_archive(self._kept.archive, folder, number, self._budget)
        self._claim = claim
        self._kept.take_archive(ArchiveId(claim.folder.name, claim.run))
        if claim.note:
            self._inform(claim.note)
        if continued:
            clean = partial(self._budget.call, partial(tidy, claim.folder, step))
            if moved := self._failures.result_of("tidying the archive", clean):
                self._warn(moved)
        return claim.folder

    def _written_since(self, until: int) -> list[Snapshot]:
        """Read the snapshots of this run that were archived after the latest one in the checkpoint."""
        last, folder, monitor = self._kept.schedule.last_step, self.folder, self._kept.monitor
        if folder is None or monitor is None or last is None:
            return []
        find = partial(snapshots_between, folder, last, until, monitor.probe.names, self._failures.note)
        return self._failures.result_of("reading the archive", lambda: self._budget.call(find)) or []

    def _publish(self, snapshot: Snapshot, paths: Mapping[str, str], seconds: float, note: str) -> None:
        if self.publisher is None and self._rank_zero.is_here:
            self.publisher = self._open_publisher(snapshot, paths, seconds, note)
        if self.publisher is not None:
            self.publisher.publish(snapshot)

    def _open_publisher(self, snapshot: Snapshot, paths: Mapping[str, str], seconds: float, note: str) -> Publisher:
        """Report what was found, and pass it to the loggers. The first snapshot took ``seconds``."""
        options, schedule, monitor = self._kept.options, self._kept.schedule, self._kept.monitor
        assert monitor is not None
        found = reports.found_text(
            monitor.found(),
            paths,
            monitor.probe,
            schedule=schedule,
            seconds=seconds,
            folder=self.folder,
            size=stored_bytes(snapshot),
            images=monitor.probe.stored_bytes,
            note=note,
        )
        self._inform(found)
        return Publisher(
            self._loggers,
            monitor.probe,
            folder=self.folder,
            before_writing=None if self._claim is None else self._claim.renew,
            style=options.drawing,
            every_layer=monitor.draws_every_layer,
            history=monitor.history,
            curves=monitor.curves,
            settings=f"{found}\n\n{reports.settings_text(options, paths, schedule, monitor.probe)}",
            name=self._name,
            failures=self._failures,
            disk_reserve=options.disk_reserve,
            budget=self._budget,
            write_report=write_report,
            heads=options.heads,
            keep_pictures=options.keep_pictures,
            expected=schedule.count(),
        )
