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
from attn_monitor.errors import NoImagesError, with_role
from attn_monitor.measurements import HealthFlag, Metrics
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.train.cost import Cost
from attn_monitor.train.ema_watch import EmaWatch
from attn_monitor.train.evaluation import Evaluation
from attn_monitor.train.fitting_probe import check_models
from attn_monitor.train.kept import Kept
from attn_monitor.train.probe_search import ObservedInputs
from attn_monitor.train.run_errors import SNAPSHOT, USER_ERRORS, RunErrors, Stage, WatchedRoles
from attn_monitor.train.run_output import RunOutput
from attn_monitor.train.targets import FindTargets
from attn_monitor.train.training_watch import TrainingWatch

PLACES = "checking the places of tokens"  # the part's name in `Failures`


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
        self._inputs = ObservedInputs(options.probe, rank_zero, self.failures)
        self._ema = EmaWatch(options.health, self.failures, self._found)
        self._findings: list[HealthFlag] = []  # flags of the EMA watch, stored with the next snapshot
        self._roles = WatchedRoles(self.failures, inform)
        self._training = TrainingWatch(self.failures, inform) if options.metrics.training else None
        self._evaluate: Evaluation | None = None
        if options.evaluation is not None:
            self._evaluate = Evaluation(options.evaluation, kept.first_accuracy, self.failures, inform)
        kept.start(distributed=distributed)
        if kept.monitor is None and (probe := rank_zero.run(options.probe.load)) is not None:
            kept.watch(probe)

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

    def find_probe(self, find: Callable[[], ProbeBatch | None]) -> None:
        """Watch the images that rank zero finds, unless there are some already."""
        if self.monitor is None and (probe := self.rank_zero.run(find)) is not None:
            self.kept.watch(probe)

    def adopt_probe(self, find: Callable[[], ProbeBatch | None], known: Callable[[], bool]) -> None:
        """Watch the images that rank zero finds in the run's data; ``known`` is whether models receive them as such.

        After a failure, those of the first training batch are watched.
        """

        def adopt() -> None:
            self.find_probe(find)
            self._inputs.confirm(self.rank_zero.run(known))

        with self.cost.of_discovery():
            self.errors.attempt("finding images of the data", adopt)

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
        later = self.rank_zero.run(lambda: self.cost.fits_from(step, last))
        if later is not None:
            schedule.postpone(later)
        return later is None

    def ensure_probe(self, find: Callable[[], ProbeBatch], step: int, targets: FindTargets, batch: Any) -> bool:
        """Find images to watch if there are none yet; a failure is retried at the next snapshot.

        If the batch holds no images, those that enter the models in its step are watched from the next step on.

        Args:
            find: finds a probe on rank zero.
            step: optimizer steps done.
            targets: finds the models.
            batch: what the next step receives.

        Returns:
            Whether there are images now.
        """

        def find_or_look() -> None:
            try:
                self.find_probe(find)
            except NoImagesError:
                with targets() as found:
                    if not self._inputs.observe(found.models.values(), batch, self.kept.root):
                        raise

        found = self.errors.attempt("taking images of a batch", find_or_look)
        if not found and not self.errors.searches_again():
            self.kept.schedule.taken(step)
        self.errors.report()
        return self.monitor is not None

    def settle(self) -> None:
        """After an observed batch, compare the probe with what the models received.

        If they agree, or nothing was seen, the first snapshot is published; else it is retaken of what they receive.
        """
        seen = self._inputs.stop()
        if seen is None:
            return

        def compare() -> None:
            probe = self._inputs.other_images(seen, None if self.monitor is None else self.monitor.probe)
            if probe is not None:
                self.kept.watch(probe)
                self.kept.schedule.taken(None)
                self.output.drop()
                self.errors.enter(Stage.TRAINING)
                self.cost.snapshots = 0

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

    def snapshot(
        self,
        targets: FindTargets,
        *,
        step: int,
        epoch: int,
        batch: Any = None,
        last: bool = False,
        wait: bool = False,
    ) -> AttentionSnapshot | None:
        """Take a snapshot and publish it.

        Args:
            targets: finds the models.
            step: optimizer steps done.
            epoch: from 0 on.
            batch: what the next step receives.
            last: whether the run ends with this snapshot.
            wait: whether to wait for global features that are not known yet; else they are added to what is written.

        Returns:
            The snapshot, None if it failed.
        """
        taken = list[AttentionSnapshot]()
        self.errors.report()
        with self.cost.of_a_snapshot(step):
            self._ema.end(step)
            # Rank zero decides, as all processes must agree and their clocks differ.
            now, flags, paused = self.rank_zero.run(
                lambda: (
                    not self.failures.pause(SNAPSHOT),
                    tuple(self._findings),
                    self._roles.paused(),
                )
            )
            if now:
                training = self.rank_zero.run(
                    lambda: Metrics() if self._training is None else self._training.values(step, wait=wait or last)
                )
                take = partial(self._take, targets, step, epoch, batch, flags, paused, last, training)
                self.errors.attempt(SNAPSHOT, lambda: taken.append(take()))
                if self.errors.searches_again():
                    return None
            if not taken and self.active:
                self.failures.lost(SNAPSHOT, step)
            self.kept.schedule.taken(step)  # after Ctrl-C in it, a resumed run takes it
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

        if self.cost.snapshots:
            with self.cost.of_a_snapshot():
                self.errors.attempt(PLACES, check)
            self.errors.report()

    def begin_batch(self, step: int, batch: Any) -> None:
        """Go on from the start of the run, and observe what the models return if a snapshot follows shortly."""
        if self._training is not None and self.active:
            self._training.begin(step, self.kept.schedule.next_due(), batch)
        self.errors.begin_step()

    def loss_is(self, loss: Any) -> None:
        """Keep the loss of the batch that has ended, a tensor or a number."""
        if self._training is not None and self.active:
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
        self.settle()

    def close(self) -> None:
        """Write everything, and report what watching has cost and found."""
        self.settle()
        self.output.close(self.cost)
        if self.monitor is None and self._inputs.batches:
            self.failures.note(
                "attention was not watched in this run: its batches hold no floating-point images, such as (batch, "
                "channels, height, width), and none entered the models as they were called. Pass probe= a folder, a "
                "tensor or a ProbeBatch"
            )
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
        if self._training is not None:
            self._training.stop()
        self._inputs.stop()
        self.kept.end()
        self.errors.enter(Stage.UNWATCHED)

    def _check(self, models: Mapping[str, nn.Module]) -> AttentionMonitor:
        """Find the models' attention; `HeadError` if a head to draw does not exist."""
        monitor = check_models(self.kept, models, self.rank_zero)
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
        self,
        targets: FindTargets,
        step: int,
        epoch: int,
        batch: Any,
        flags: Sequence[HealthFlag],
        paused: Sequence[str],
        last: bool,
        training: Metrics,
    ) -> AttentionSnapshot:
        monitor, first = self.monitor, not self.cost.snapshots
        assert monitor is not None
        with targets() as (models, paths, note):
            looked_at = {role: model for role, model in models.items() if role not in paused} or models
            if first:
                with self.cost.of_discovery():
                    monitor = self._check(looked_at)
                looked_at = {role: model for role, model in looked_at.items() if role not in monitor.failed}
            started = time.perf_counter()
            if (evaluate := self._evaluate) is not None:
                on, models_now = monitor, looked_at
                values, lost = self.rank_zero.run(lambda: evaluate(on, models_now, step, last=last))
                training, flags = Metrics({**training, **values}), (*flags, *lost)
            if self._training is not None and self._training.late is not None:
                monitor.history.late[step] = self._training.late
            snapshot = monitor.snapshot(looked_at, step=step, epoch=epoch, flags=flags, last=last, others=training)
        self._roles.took(snapshot, monitor, models, paths)
        self.errors.enter(Stage.WATCHING)
        self.cost.snapshots, self._findings = self.cost.snapshots + 1, []
        self.output.hold(snapshot, paths, time.perf_counter() - started, note)
        looks = first and not self._inputs.known and not self.kept.resumed
        looks = looks and self._inputs.observe(models.values(), batch, self.kept.root)
        if not looks or self.kept.options.probe.are_given:
            self.output.publish(self._findings)
        if self.checks_ema and self.rank_zero.is_here:
            self._ema.begin(models, self.kept.root, step)
        if self._training is not None and self.rank_zero.is_here:
            firsts = {role: snapshot.layer(role).prefix_names[:1] == ("CLS",) for role in snapshot.roles}
            self._training.follow(models, self.kept.around, firsts)
        return snapshot

    def _publish_held(self) -> None:
        self.errors.attempt(SNAPSHOT, lambda: self.output.publish(self._findings))
