"""`Run`: watch one run, from finding attention to the report at the end; callback and `Watch` are doors to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from attn_monitor.attention_snapshot import AttentionSnapshot
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.distributed import RankZero
from attn_monitor.errors import ForwardError, ProbeError, with_role
from attn_monitor.measurements import HealthFlag, Metrics
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.train.cost import Cost
from attn_monitor.train.ema_watch import EmaWatch
from attn_monitor.train.evaluation import Evaluation
from attn_monitor.train.fitting_probe import fit_probe
from attn_monitor.train.kept import Kept
from attn_monitor.train.run_errors import SNAPSHOT, USER_ERRORS, RunErrors, Stage, WatchedRoles
from attn_monitor.train.run_output import RunOutput
from attn_monitor.train.run_probe import RunProbe
from attn_monitor.train.targets import FindTargets, SnapshotRequest
from attn_monitor.train.training_watch import TrainingWatch


class Run:
    """Watch one run: made when it is set up, dropped after `end`.

    Before the first step, errors that the user can fix end the run if ``strict``; else it goes on unwatched. All other
    failures are warnings, and the part is retried; with ``on_error="raise"`` the next report raises them. If one role
    fails, the others are still recorded.

    Args:
        kept: what the run continues, and hands on.
        rank_zero: decides for all processes.
        warn: shows a warning on rank zero.
        inform: shows a message on rank zero.
        name: of the callback in tags, empty for none.
        strict: whether errors that the user can fix end the run before its first step.
        roles_given: whether the user named the roles: then a role that fails before the first step is an error.
        distributed: whether the processes share the probe.
        watched: whether this process watches at all.
        checks_ema: whether to check how a teacher follows its student, if the health limits say so.
        budget: how long the run may wait for disks and loggers; None is a new one.

    Raises:
        ProbeError: The given images cannot be used.
    """

    def __init__(
        self,
        kept: Kept,
        rank_zero: RankZero,
        *,
        warn: Callable[[str], None],
        inform: Callable[[str], None],
        name: str = "",
        strict: bool = False,
        roles_given: bool = False,
        distributed: bool = False,
        watched: bool = True,
        checks_ema: bool = True,
        budget: WaitBudget | None = None,
    ) -> None:
        options = kept.options
        self.kept, self.rank_zero, self.name = kept, rank_zero, name
        self.errors = RunErrors(warn, strict=strict, raises=options.on_error == "raise", watched=watched)
        self.failures, self.budget, self.cost = self.errors.failures, budget or WaitBudget(), Cost()
        self.output = RunOutput(kept, rank_zero, self.failures, self.budget, name=name, warn=warn, inform=inform)
        self._roles_given, self.checks_ema = roles_given, checks_ema and options.health.check_ema
        self.probe = RunProbe(kept, rank_zero, self.errors, self.cost)
        self._ema = EmaWatch(options.health, self.failures, self._found)
        self._findings: list[HealthFlag] = []  # flags of the EMA watch, stored with the next snapshot
        self._roles = WatchedRoles(self.failures, inform)
        self._training = TrainingWatch(self.failures, inform)
        self._evaluate: Evaluation | None = None
        if options.evaluation is not None:
            self._evaluate = Evaluation(options.evaluation, kept.first_accuracy, self.failures, inform)
        kept.start(distributed=distributed)
        if watched:
            self.probe.find(options.probe.load)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy or a pickle of what holds a run has none: no threads, locks and models

    @property
    def active(self) -> bool:
        """Whether attention is watched in this run."""
        return self.errors.active

    @property
    def monitor(self) -> AttentionMonitor | None:
        """Return the object that takes the snapshots; None until there are images."""
        return self.kept.monitor

    def due(self, step: int) -> bool:
        """Whether to take a snapshot after this many optimizer steps, before the next batch.

        Where the user has not given the distance, one that would make snapshots take more than 5 % of the loop is put
        off. Rank zero decides that for all processes, which ask it at the same steps, as their clocks differ.
        """
        schedule = self.kept.schedule
        if not self.active or not schedule.due(step):
            return False
        last = schedule.last_step
        if schedule.is_given or last is None:
            return True
        later = self.rank_zero.run(lambda: self.cost.next_check_step(step, last))
        if later is not None:
            schedule.postpone(later)
        return later is None

    def compare_probe(self) -> None:
        """After an observed batch, compare the probe with what the models received.

        If they agree, or nothing was seen, the first snapshot is published; else it is retaken of what they receive.
        """

        def compare() -> None:
            if self.probe.compare():
                self.output.drop()
                self.errors.enter(Stage.TRAINING)
                self.cost.snapshots = 0

        if self.probe.is_observing:
            self.errors.attempt("comparing the probe with training's images", compare)
            self._publish_held()
            self.errors.report()

    def discover(self, targets: FindTargets) -> None:
        """Find the models' attention on images of the probe's size, if there is a probe."""

        def find() -> None:
            with targets() as (models, *_):
                if self.monitor is not None:
                    self._check(models)

        with self.cost.of_discovery():
            self.errors.attempt(SNAPSHOT, find)
            self.errors.report()

    def snapshot(self, wanted: SnapshotRequest) -> AttentionSnapshot | None:
        """Take a snapshot and publish it; return None if it failed."""
        taken, step = list[AttentionSnapshot | None](), wanted.step
        self.errors.report()
        with self.cost.of_a_snapshot(step):
            self._ema.end(step)
            # Rank zero decides, as all processes must agree and their clocks differ.
            now, flags, paused = self.rank_zero.run(
                lambda: (not self.failures.pause(SNAPSHOT), tuple(self._findings), self._roles.paused())
            )
            if now:
                training = self.rank_zero.run(lambda: self._training.values(step, wait=wanted.wait or wanted.last))
                self.errors.attempt(SNAPSHOT, lambda: taken.append(self._take(wanted, flags, paused, training)))
                if self.errors.searches_again():
                    return None
            if not taken and self.active:
                self.failures.lost(SNAPSHOT, step)
            self.kept.schedule.set_last_step(step)  # after Ctrl-C in it, a resumed run takes it
        self.errors.report()
        return taken[0] if taken else None

    def late_metrics(self, snapshot: AttentionSnapshot) -> dict[str, float]:
        """Compute now, for all processes, what else is on its way to the metrics of the latest snapshot, by tag."""
        monitor = self.monitor
        assert monitor is not None
        compute = partial(self.rank_zero.run, lambda: monitor.colored(snapshot).scalars(heads=False))
        return self.failures.result_of("measuring patch features", compute) or {}

    def confirm(self, targets: FindTargets, *, step: int) -> None:
        """Check once more which patch each token is, if the run ends at the step of the latest snapshot."""

        def check() -> None:
            with targets() as (models, *_):
                found = () if self.monitor is None else self.monitor.confirm(models, step=step)
            self.output.alert(found, step)

        if self.errors.stage is Stage.WATCHING:
            with self.cost.of_a_snapshot():
                self.errors.attempt("checking the places of tokens", check)
            self.errors.report()

    def begin_batch(self, step: int, batch: Any) -> None:
        """Go on from the start of the run, and observe what the models return if a snapshot follows shortly."""
        if self.active:
            self._training.begin(step, self.kept.schedule.next_due(), batch)
        self.errors.begin_step()

    def record_loss(self, loss: Any) -> None:
        """Keep the loss of the batch that has ended, a tensor or a number."""
        if self.active and self.kept.options.metrics.training:
            self._training.end(loss)

    def between_steps(self, step: int) -> None:
        """Check how the teacher is updated, between batches without a snapshot; a few steps are checked at times."""
        if self._ema.wants(step):
            with self.cost.of_a_snapshot():
                self._ema.between_steps(step)
            self.errors.report()

    def batch_ended(self) -> None:
        """Sample weights at the end of a batch, and compare the probe with what it held if that was observed."""
        self._ema.batch_ended()
        self.compare_probe()

    def close(self) -> None:
        """Write everything, and report what watching has cost and found."""
        self.compare_probe()
        self.output.close(self.cost)
        self.probe.note_missing()
        self.failures.sum_up()
        self.errors.report()

    def abort(self) -> None:
        """After an exception, write what was captured for a few seconds, and report what is not written."""
        self._publish_held()  # its probe is not known to be wrong
        self.output.abort()
        self.failures.sum_up()
        self.errors.report(reraise=False)  # must not hide the run's own exception
        self.output.report_end()
        self.end()

    def end(self) -> None:
        """Release the run's models, threads and folder lock."""
        self.output.end()
        self._ema.stop()
        self._training.stop()
        self.probe.stop()
        self.kept.end()
        self.errors.enter(Stage.UNWATCHED)

    def _check(self, models: Mapping[str, nn.Module]) -> AttentionMonitor:
        """Find the models' attention; `HeadError` if a head to draw does not exist."""
        monitor = fit_probe(self.kept, models, self.rank_zero)
        for role, error in monitor.failed.items():
            if self._roles_given and self.errors.stage is Stage.STARTING and isinstance(error, USER_ERRORS):
                raise with_role(role, error)
        self._roles.failed(monitor.failed)
        monitor.check_heads(self.kept.options.drawing.drawn_heads)
        return monitor

    def _found(self, flags: Sequence[HealthFlag], step: int) -> None:
        """Report flags at once; the next snapshot stores them."""
        if self.monitor is not None and self.output.takes_flags:
            news = self.monitor.health.add(flags)
            self._findings += news
            self.output.alert(news, step)

    def _take(
        self, wanted: SnapshotRequest, flags: Sequence[HealthFlag], paused: Sequence[str], training: Metrics
    ) -> AttentionSnapshot | None:
        """Take a snapshot, publish it unless its images are yet to be compared, and watch the next steps.

        There is none yet where the models refuse images as the data holds them.

        Args:
            wanted: the snapshot to take.
            flags: health flags to store with it.
            paused: roles to leave out.
            training: metrics to store with it.
        """
        monitor, first, step = self.monitor, self.errors.stage is not Stage.WATCHING, wanted.step
        assert monitor is not None
        with wanted.targets() as (models, paths, note):
            looked_at = {role: model for role, model in models.items() if role not in paused} or models
            if first:
                with self.cost.of_discovery():
                    try:
                        monitor = self._check(looked_at)
                    except (ForwardError, ProbeError) as error:
                        if self.errors.strict or not self.probe.await_entering(error, models.values(), wanted.batch):
                            raise
                        return None
                looked_at = {role: model for role, model in looked_at.items() if role not in monitor.failed}
            started = time.perf_counter()
            if (evaluate := self._evaluate) is not None:
                values, lost = self.rank_zero.run(partial(evaluate, monitor, looked_at, step, last=wanted.last))
                training, flags = Metrics({**training, **values}), (*flags, *lost)
            late, last = self._training.late, wanted.last
            snapshot = monitor.snapshot(
                looked_at, step=step, epoch=wanted.epoch, flags=flags, last=last, others=training, late=late
            )
        self._roles.took(snapshot, monitor, models, paths)
        self.errors.enter(Stage.WATCHING)
        self.cost.snapshots, self._findings = self.cost.snapshots + 1, []
        self.output.hold(snapshot, paths, time.perf_counter() - started, note)
        observes = first and self.probe.observe_first(models.values(), wanted.batch)
        if not observes or self.kept.options.probe.are_given:
            self.output.publish(self._findings)
        if self.rank_zero.is_here:
            self._watch_steps(models, snapshot)
        return snapshot

    def _watch_steps(self, models: Mapping[str, nn.Module], snapshot: AttentionSnapshot) -> None:
        """Watch on rank zero how the next steps update the models, and what their forwards return."""
        if self.checks_ema:
            self._ema.begin(models, self.kept.root, snapshot.step)
        if self.kept.options.metrics.training:
            firsts = {role: snapshot.layer(role).prefix_names[:1] == ("CLS",) for role in snapshot.roles}
            self._training.watch_models(models, self.kept.enclosing, firsts)

    def _publish_held(self) -> None:
        self.errors.attempt(SNAPSHOT, lambda: self.output.publish(self._findings))
