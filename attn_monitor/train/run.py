"""`Session`: the engine of Lightning's callback and `Watch`, from finding attention to the report at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attn_monitor.attention_snapshot import AttentionSnapshot
from attn_monitor.background import wait_budget
from attn_monitor.capture.choose_forward import FORWARD_OPTIONS, ForwardOption
from attn_monitor.capture.forward import Forward
from attn_monitor.capture.isolation import reporting
from attn_monitor.capture.sharded_models import forward_within
from attn_monitor.distributed import RankZero
from attn_monitor.errors import AttentionError, NoAttentionError, NoImagesError, ProbeError, TargetError
from attn_monitor.measurements import HealthFlag
from attn_monitor.monitor import AttentionMonitor, named
from attn_monitor.player.report import write_report
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.archive import snapshots_between
from attn_monitor.snapshot import Snapshot
from attn_monitor.trackers.publisher import Publisher
from attn_monitor.train import reports
from attn_monitor.train.archive_folder import ArchiveId, claim_archive, release, tidy
from attn_monitor.train.backbone_inputs import BackboneInputs
from attn_monitor.train.options import RunOptions
from attn_monitor.train.probe_search import what_to_watch
from attn_monitor.train.run_state import FindTargets, RunState
from attn_monitor.train.schedule import Schedule
from attn_monitor.train.wiring_watch import WiringWatch

SNAPSHOT = "taking a snapshot"  # names of parts in `Failures`
STATE = "keeping attention's past in a checkpoint"
PLACES = "checking the places of tokens"
WIRING = "looking at how student and teacher are wired"
USER_ERRORS: tuple[type[Exception], ...] = (AttentionError, ProbeError, TargetError)  # that the user can fix
STATE_VERSION = 1
BATCHES = 8  # to observe at most in search of images that enter the models


class Session:
    """Watch one run after another. Between runs it holds settings and checkpoint state only, and can be copied.

    Before the first step, errors that the user can fix end the run if ``strict``; else it goes on unwatched. All other
    failures are warnings, and the part is retried; with ``on_error="raise"`` the next report raises them. If one role
    fails, the others are still recorded.

    Args:
        options: what to watch and how.
        schedule: when to take snapshots.
        warn: shows a warning on rank zero.
        inform: shows a message on rank zero.
        strict: whether errors that the user can fix end the run before its first step.
        named: whether the user named the roles: then a role that fails before the first step is an error.
    """

    def __init__(
        self,
        options: RunOptions,
        schedule: Schedule,
        *,
        warn: Callable[[str], None],
        inform: Callable[[str], None],
        strict: bool = False,
        named: bool = False,
    ) -> None:
        self.options, self.schedule, self.strict = options, schedule, strict or options.on_error == "raise"
        self.warn, self.inform, self.named = warn, inform, named
        self.monitor: AttentionMonitor | None = None
        self.archive = ArchiveId()
        self.run_folder: Path | None = None  # folder of the latest run
        self.resumed = False  # whether the run was resumed from a checkpoint
        self.distributed = False  # whether several processes share the probe
        self.run = RunState()

    def start(self, rank_zero: RankZero, *, name: str = "", distributed: bool = False) -> None:
        """Begin a run with the images that were given; only checkpoint state of an earlier run stays.

        Args:
            rank_zero: decides for all processes.
            name: of the callback in tags, empty for none.
            distributed: whether the processes share the probe.

        Raises:
            ProbeError: The images cannot be used.
        """
        self.end()
        self.run, self.resumed, self.distributed = RunState(rank_zero, name), False, distributed
        self.run.looks_at_wiring = self.options.health.check_ema
        if self.monitor is not None:
            self.monitor.distributed = distributed
        elif (probe := rank_zero.run(self.options.probe.load)) is not None:
            self.monitor = self._make_monitor(probe)

    def find_probe(self, find: Callable[[], ProbeBatch | None]) -> None:
        """Watch the images that rank zero finds, unless there are some already."""
        if self.monitor is None and (probe := self.run.rank_zero.run(find)) is not None:
            self.monitor = self._make_monitor(self.options.probe.with_statistics(probe))

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
                    if not self._look_at_inputs(found.models, batch):
                        raise

        self.run.not_found = False
        if not self.attempt("taking images of a batch", find_or_look) and not self._is_first_miss():
            self.schedule.taken(step)
        self.report()
        return self.monitor is not None

    def settle(self) -> None:
        """After an observed batch, compare the probe with what the models received.

        If they agree, or nothing was seen, the first snapshot is published; else it is retaken of what they receive.
        """
        run = self.run
        if run.inputs is None:
            return
        inputs, run.inputs = run.inputs, None
        inputs.stop()
        self.attempt("comparing the probe with training's images", lambda: self._compare(inputs))
        self.attempt(SNAPSHOT, self._publish_held)
        self.report()

    def discover(self, targets: FindTargets) -> None:
        """Find the models' attention on images of the probe's size, if there is a probe."""

        def find() -> None:
            with targets() as (models, *_):
                if self.monitor is not None:
                    self._check(self.monitor, models)

        with self.run.cost.of_discovery():
            self.attempt(SNAPSHOT, find)
            self.report()

    def begin_or_continue(self, step: int, run_folder: Path) -> None:
        """Drop the past, unless this run continues it: resumed, or trained further in the same folder."""

        def goes_on() -> bool:
            ahead = self.schedule.last_step is not None and self.schedule.last_step > step
            return not ahead and (self.resumed or (step > 0 and run_folder == self.run_folder))

        if not self.run.rank_zero.run(goes_on):
            self.schedule.last_step, self.archive = None, ArchiveId()
            if self.monitor is not None:
                self.monitor.forget()
        self.run_folder = run_folder

    def open(
        self, loggers: Sequence[Any], folder: Path | None, *, number: int = 1, step: int, until: int | None = None
    ) -> None:
        """Open the archive, and read the snapshots that were written after the checkpoint of a resumed run.

        Args:
            loggers: the run's loggers.
            folder: of the archive; None for no archive.
            number: which of the numbered folders to try first, see `claim_archive`.
            step: optimizer steps done; later snapshots in the archive are moved aside.
            until: the last step to read, which need not be taken again; None is ``step``.
        """
        run = self.run
        run.opened, run.loggers = True, list(loggers)
        if folder is not None:
            claim = partial(self._claim, folder, number, step)
            run.folder = run.failures.result_of("opening the archive", lambda: run.rank_zero.run(claim))
        if text := reports.ignored_text(loggers):
            self.inform(text)
        for snapshot in run.rank_zero.run(lambda: self._written_since(step if until is None else until)):
            assert self.monitor is not None
            self.monitor.remember(snapshot)
            self.schedule.taken(snapshot.step)

    def snapshot(
        self, targets: FindTargets, *, step: int, epoch: int, batch: Any = None, last: bool = False
    ) -> AttentionSnapshot | None:
        """Take a snapshot and publish it.

        Args:
            targets: finds the models.
            step: optimizer steps done.
            epoch: from 0 on.
            batch: what the next step receives.
            last: whether the run ends with this snapshot.

        Returns:
            The snapshot, None if it failed.
        """
        run, taken = self.run, list[AttentionSnapshot]()
        self.report()
        with run.cost.of_a_snapshot():
            if (wiring := run.wiring) is not None:
                self._find(lambda: wiring.end(step), step)
            # Rank zero decides, as all processes must agree and their clocks differ.
            now, flags, paused = run.rank_zero.run(
                lambda: (
                    not run.failures.pause(SNAPSHOT),
                    tuple(run.findings),
                    tuple(filter(self._pauses, run.failing)),
                )
            )
            run.not_found = False
            if now:
                take = partial(self._take, targets, step, epoch, batch, flags, paused, last)
                self.attempt(SNAPSHOT, lambda: taken.append(take()))
            if self._is_first_miss():
                return None
            if not taken and run.active:
                run.failures.lost(SNAPSHOT, step)
            self.schedule.taken(step)  # after Ctrl-C in it, a resumed run takes it
        self.report()
        return taken[0] if taken else None

    def confirm(self, targets: FindTargets, *, step: int) -> None:
        """Check once more which patch each token is, if the run ends at the step of the latest snapshot."""

        def check() -> None:
            with targets() as (models, *_):
                found = () if self.monitor is None else self.monitor.confirm(models, step=step)
            if self.run.publisher is not None:
                self.run.publisher.alert(found, step)

        if self.run.cost.snapshots:
            with self.run.cost.of_a_snapshot():
                self.attempt(PLACES, check)
            self.report()

    def between_steps(self, step: int) -> None:
        """Check how the teacher is updated, between batches without a snapshot; a few steps are checked at times."""
        wiring = self.run.wiring
        if wiring is not None and wiring.wants(step):
            with self.run.cost.of_a_snapshot():
                self._find(lambda: wiring.between_steps(step), step)
            self.report()

    def batch_ended(self) -> None:
        """Sample the weights at the end of a batch: some loops have updated an EMA by now, others do so later."""
        if self.run.wiring is not None:
            self._find(self.run.wiring.batch_ended, self.schedule.last_step or 0)
        self.settle()

    def close(self) -> None:
        """Write everything, and report what watching has cost and found."""
        self.settle()
        run = self.run
        if run.publisher is not None:
            ended = time.perf_counter()
            run.publisher.close()
            self.inform(run.cost.text(time.perf_counter() - ended, run.publisher.seconds, run.folder))
            self.inform(reports.health_text([] if self.monitor is None else self.monitor.health.flags))
        if self.monitor is None and run.batches_looked_at:
            run.failures.note(
                "attention was not watched in this run: its batches hold no floating-point images (batch, channels, "
                "height, width), and none entered the models as they were called. Pass probe= a folder, a tensor or a "
                "ProbeBatch"
            )
        run.failures.sum_up()
        self.report()

    def abort(self) -> None:
        """After an exception, write what was captured for a few seconds, and report what is not written."""
        run = self.run
        self.attempt(SNAPSHOT, self._publish_held)  # its probe is not known to be wrong
        run.budget.limit(wait_budget.EXCEPTION_SECONDS)
        if run.publisher is not None:
            run.publisher.close(finish=False)
        run.failures.sum_up()
        self.report(reraise=False)  # must not hide the run's own exception
        if run.publisher is not None and run.folder is not None and run.publisher.archived is not None:
            self.inform(f"the archive in {run.folder} ends with step {run.publisher.archived}")
        self.end()

    def end(self) -> None:
        """Release the run's models, threads and folder lock."""
        if self.run.publisher is not None:
            self.run.publisher.close(finish=False)
        if self.run.claim is not None:
            release(self.run.claim)
        self._stop_wiring()
        if self.run.inputs is not None:
            self.run.inputs.stop()
        if self.monitor is not None:
            self.monitor.let_go()
        self.run = RunState()

    def attempt(self, part: str, action: Callable[[], object]) -> bool:
        """Call ``action`` as a part of `Failures`, and return whether it succeeded.

        Before the first step, an error that the user can fix ends the run if ``strict``, else only its watching. Models
        that are not found may be built in the first step, so they are searched once more after it.
        """
        run = self.run
        later = () if self.strict or run.cost.snapshots else (NoAttentionError,)
        try:
            with reporting(run.failures.note):
                return run.failures.attempt(part, action, raising=later if run.training else USER_ERRORS)
        except USER_ERRORS as error:
            if self.strict:
                raise
            run.not_found = run.looks_again and isinstance(error, NoAttentionError)
            if run.not_found:
                return False
            if run.active:
                self.warn(f"attention is not watched in this run. {str(error).rstrip('.')}")
            run.active = False
            return False

    def _is_first_miss(self) -> bool:
        """Whether no model was found for the first time: nothing counts as taken then, and the next batch retries."""
        self.run.looks_again = self.run.looks_again and not self.run.not_found
        return self.run.not_found

    def report(self, *, reraise: bool = True) -> None:
        """Warn of failures since the last report; with ``on_error="raise"`` raise the first."""
        self.run.failures.report(self.warn, reraise=reraise and self.options.on_error == "raise")

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state, the last step and the archive: a few megabytes, without pickled objects.

        It is empty if there is no monitor, or if it fails, as the training's checkpoint matters more.
        """
        state = None if self.monitor is None else self.run.failures.result_of(STATE, self.monitor.state_dict)
        if state is None:
            return {}
        return {
            "version": STATE_VERSION,
            "monitor": state,
            "last_step": self.schedule.last_step,
            "archive": self.archive.name,
            "run": self.archive.run,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the same images from the step after the last snapshot.

        A state that cannot be read raises any exception, and changes nothing.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"its version is {state.get('version')!r}, expected {STATE_VERSION}")
        monitor, given = self._make_monitor(ProbeBatch.from_state_dict(state["monitor"]["probe"])), self.monitor
        monitor.load_state_dict(state["monitor"])
        last_step, archive, run = state["last_step"], state["archive"], state["run"]
        if not isinstance(last_step, (int, type(None))) or not isinstance(archive, (str, type(None))):
            raise ValueError(f"last_step={last_step!r}, archive={archive!r}: expected a number and a folder's name")
        self.monitor, self.schedule.last_step, self.resumed = monitor, last_step, True
        self.archive = ArchiveId(archive, run)
        if given is not None and not given.probe.has_same_images_as(monitor.probe):
            self.warn(
                f"the probe images of the checkpoint are shown ({', '.join(monitor.probe.names)}) and not those of the "
                "probe argument, so that maps can be compared over the whole run"
            )

    def _make_monitor(self, probe: ProbeBatch) -> AttentionMonitor:
        given = self.options.forward
        ways = FORWARD_OPTIONS if given is None else (ForwardOption(given),)
        forward = [replace(way, forward=partial(self._call, way.forward)) for way in ways]
        return self.options.monitor(probe, forward=forward, or_mean=True, distributed=self.distributed, alone=True)

    def _call(self, forward: Forward, model: nn.Module, images: Tensor) -> Any:
        """Call a model by ``forward``, through the FSDP units around it if there are any."""
        return forward_within(model if self.run.root is None else self.run.root, forward)(model, images)

    def _check(self, monitor: AttentionMonitor, models: Mapping[str, nn.Module]) -> None:
        """Find the models' attention; `HeadError` if a head to draw does not exist."""
        monitor.check(models)
        for role, error in monitor.failed.items():
            if self.named and not self.run.training and isinstance(error, USER_ERRORS):
                raise named(role, error)
            self._failed(role, error)
        monitor.check_heads(self.options.drawing.drawn_heads)

    def _claim(self, folder: Path, number: int, step: int) -> Path:
        claim, continued = claim_archive(self.archive, folder, number, self.run.budget)
        self.run.claim, self.archive = claim, ArchiveId(claim.folder.name, claim.run)
        if claim.note:
            self.inform(claim.note)
        if continued:
            told = self.run.failures.result_of(
                "tidying the archive", lambda: self.run.budget.call(lambda: tidy(claim.folder, step))
            )
            if told:
                self.warn(told)
        return claim.folder

    def _written_since(self, until: int) -> list[Snapshot]:
        """Read the snapshots of this run that were archived after the latest one in the checkpoint."""
        last, folder = self.schedule.last_step, self.run.folder
        if folder is None or self.monitor is None or last is None:
            return []
        names, note = self.monitor.probe.names, self.run.failures.note
        read = partial(snapshots_between, folder, last, until, names, note)
        found = self.run.failures.result_of("reading the archive", lambda: self.run.budget.call(read))
        return found or []

    def _watch_wiring(self, models: Mapping[str, nn.Module], step: int) -> Sequence[HealthFlag]:
        run = self.run
        if run.wiring is None or run.wiring.models != models:
            self._stop_wiring()
            run.wiring = WiringWatch(models, run.root, self.options.health)
        return run.wiring.watch(step)

    def _stop_wiring(self) -> None:
        if self.run.wiring is not None:
            self.run.wiring.stop()
        self.run.wiring = None

    def _find(self, look: Callable[[], Sequence[HealthFlag]], step: int) -> None:
        """Report at once what ``look`` finds wrong with the EMA; the next snapshot stores it."""
        run = self.run
        try:
            found = look()
        except Exception as error:
            run.failures.failed(WIRING, error)
            self._stop_wiring()  # until the next snapshot
            return
        if self.monitor is not None and (run.publisher is not None or run.held is not None):
            news = self.monitor.health.add(found)
            run.findings += news
            if run.publisher is not None:
                run.publisher.alert(news, step)

    def _pauses(self, role: str) -> bool:
        return self.run.failures.pause(_part_of(role)) > 0

    def _failed(self, role: str, error: Exception) -> None:
        """Record that a role failed while others were recorded."""
        self.run.failing.add(role)
        self.run.failures.failed(_part_of(role), error)

    def _take(
        self,
        targets: FindTargets,
        step: int,
        epoch: int,
        batch: Any,
        flags: Sequence[HealthFlag],
        paused: Sequence[str],
        last: bool,
    ) -> AttentionSnapshot:
        run, monitor = self.run, self.monitor
        assert monitor is not None
        with targets() as (models, paths, note):
            looked_at = {role: model for role, model in models.items() if role not in paused} or models
            if not run.cost.snapshots:
                with run.cost.of_discovery():
                    self._check(monitor, looked_at)
                looked_at = {role: model for role, model in looked_at.items() if role not in monitor.failed}
            started = time.perf_counter()
            snapshot = monitor.snapshot(looked_at, step=step, epoch=epoch, flags=flags, last=last)
        for role, error in monitor.failed.items():
            self._failed(role, error)
        for role in run.failing & models.keys():
            if role in snapshot.roles:
                run.failures.worked(_part_of(role))
            else:
                run.failures.lost(_part_of(role), step)
        run.failing -= set(snapshot.roles)
        for text in filter(run.failures.is_new, monitor.left_out()):
            run.failures.note(text)
        if new := sorted(set(snapshot.roles) - run.roles) if run.roles else []:
            self.inform(f"watched from step {step} on: {', '.join(reports.named(role, paths) for role in new)}")
        run.roles |= set(snapshot.roles)
        first, seconds = not run.cost.snapshots, time.perf_counter() - started
        run.cost.snapshots, run.training, run.findings = run.cost.snapshots + 1, True, []
        run.held = partial(self._publish, snapshot, paths, seconds, note)
        looks = first and not run.inputs_known and not self.resumed and self._look_at_inputs(models, batch)
        if not (looks and not self.options.probe.are_given):
            self._publish_held()
        if run.looks_at_wiring and run.rank_zero.is_here:
            self._find(lambda: self._watch_wiring(models, step), step)
        return snapshot

    def _publish(self, snapshot: Snapshot, paths: Mapping[str, str], seconds: float, note: str) -> None:
        run, monitor = self.run, self.monitor
        assert monitor is not None
        if run.publisher is None and run.rank_zero.is_here:
            run.publisher = self._open_publisher(monitor, paths, seconds, note)
            run.publisher.publish(snapshot)
            run.publisher.alert(run.findings, snapshot.step)  # found since the snapshot was taken
        elif run.publisher is not None:
            run.publisher.publish(snapshot)

    def _publish_held(self) -> None:
        held, self.run.held = self.run.held, None
        if held is not None:
            held()

    def _look_at_inputs(self, models: Mapping[str, nn.Module], batch: Any) -> bool:
        """Observe what enters the models in the next step; False, in all processes alike, if that is not possible."""
        run = self.run
        run.batches_looked_at += 1
        if run.batches_looked_at > BATCHES:
            return False
        here = models.values() if run.rank_zero.is_here else ()
        inputs = BackboneInputs(here, batch, self.options.probe.count, run.root)
        run.inputs = inputs if run.rank_zero.run(lambda: inputs.can_see) else None
        return run.inputs is not None

    def _compare(self, inputs: BackboneInputs) -> None:
        """Replace the monitor if the models receive other images than the probe."""
        run, watched = self.run, None if self.monitor is None else self.monitor.probe
        given = self.options.probe.are_given
        probe, text = run.rank_zero.run(lambda: what_to_watch(watched, inputs, given=given))
        if text:
            run.failures.note(text)
        if probe is not None:
            self.monitor = self._make_monitor(self.options.probe.with_statistics(probe))
            run.inputs_known, run.held = True, None
            run.cost.snapshots, self.schedule.last_step = 0, None

    def _open_publisher(
        self, monitor: AttentionMonitor, paths: Mapping[str, str], seconds: float, note: str
    ) -> Publisher:
        """Report what was found, and pass it to the loggers. The first snapshot took ``seconds``."""
        run = self.run
        found = reports.found_text(
            monitor.found(), paths, monitor.probe, schedule=self.schedule, seconds=seconds, folder=run.folder, note=note
        )
        self.inform(found)
        return Publisher(
            run.loggers,
            monitor.probe,
            folder=run.folder,
            before_writing=None if run.claim is None else run.claim.renew,
            style=self.options.drawing,
            every_layer=monitor.draws_every_layer,
            history=monitor.history,
            curves=monitor.curves,
            settings=f"{found}\n\n{reports.settings_text(self.options, paths, self.schedule)}",
            name=run.name,
            failures=run.failures,
            disk_reserve=self.options.disk_reserve,
            budget=run.budget,
            write_report=write_report,
        )


def _part_of(role: str) -> str:
    return f"{SNAPSHOT} of {role}"
