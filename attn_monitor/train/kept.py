"""`Kept`: what outlives a run and goes into checkpoints: the images, their past, and which archive is the run's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attn_monitor.background.failures import Failures
from attn_monitor.capture.choose_forward import FORWARD_OPTIONS, ForwardOption
from attn_monitor.capture.observe.forward import Forward
from attn_monitor.capture.sharded_models import forward_within
from attn_monitor.distributed import RankZero
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.snapshot import Snapshot
from attn_monitor.train.archive_folder import ArchiveId
from attn_monitor.train.options import RunOptions
from attn_monitor.train.schedule import Schedule

STATE_VERSION = 1
STATE = "keeping attention's past in a checkpoint"  # the part's name in `Failures`


class Kept:
    """Hold what one run hands to the next and to checkpoints. Between runs it holds no model, and can be copied.

    Args:
        options: what to watch and how.
        schedule: when to take snapshots.
    """

    def __init__(self, options: RunOptions, schedule: Schedule) -> None:
        self.options, self.schedule = options, schedule
        self.monitor: AttentionMonitor | None = None
        self.archive = ArchiveId()
        self.first_accuracy: dict[str, float] = {}  # by role, of the first evaluation on labels
        self.resumed = False  # whether the present run has loaded a checkpoint
        self.root: nn.Module | None = None  # the outermost module, with FSDP's units around the models
        self.enclosing: tuple[nn.Module, ...] = ()  # the modules that hold the models and their heads
        self._folder: Path | None = None  # of the latest run
        self._distributed = False  # whether several processes share the probe

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "root": None, "enclosing": ()}

    def start(self, *, distributed: bool) -> None:
        """Begin a run, which loads a checkpoint later if it does."""
        self.resumed, self._distributed = False, distributed
        if self.monitor is not None:
            self.monitor.roles.distributed = distributed

    def set_enclosing(self, root: nn.Module | None, around: Sequence[nn.Module] = ()) -> None:
        """Call the models through the module ``root``; ``around`` are modules that hold them, if it is None."""
        self.root, self.enclosing = root, tuple(around) if root is None else (root,)

    def watch(self, probe: ProbeBatch) -> AttentionMonitor:
        """Watch these images from now on, without a past."""
        self.monitor = self._monitor_of(self.options.probe.with_statistics(probe))
        return self.monitor

    def take_archive(self, archive: ArchiveId) -> None:
        """Remember the archive, to go on with it if the run is resumed."""
        self.archive = archive

    def remember(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of this run that a file holds."""
        assert self.monitor is not None
        self.monitor.remember(snapshot)
        self.schedule.set_last_step(snapshot.step)

    def begin_or_continue(self, step: int, folder: Path, rank_zero: RankZero) -> None:
        """Drop the past, unless this run continues it: resumed, or trained further in the same folder."""

        def goes_on() -> bool:
            ahead = self.schedule.last_step is not None and self.schedule.last_step > step
            return not ahead and (self.resumed or (step > 0 and folder == self._folder))

        if not rank_zero.run(goes_on):
            self.archive = ArchiveId()
            self.schedule.set_last_step(None)
            self.first_accuracy.clear()
            if self.monitor is not None:
                self.monitor.forget()
        self._folder = folder

    def end(self) -> None:
        """Release the run's models."""
        self.root, self.enclosing = None, ()
        if self.monitor is not None:
            self.monitor.let_go()

    def state_dict(self, failures: Failures) -> dict[str, Any]:
        """Return the monitor's state, the last step and the archive: a few megabytes, without pickled objects.

        It is empty if there is no monitor, or if it fails, as the training's checkpoint matters more.
        """
        state = None if self.monitor is None else failures.result_of(STATE, self.monitor.state_dict)
        if state is None:
            return {}
        return {
            "version": STATE_VERSION,
            "monitor": state,
            "last_step": self.schedule.last_step,
            "not_before": self.schedule.not_before,
            "archive": self.archive.name,
            "run": self.archive.run,
            "first_accuracy": dict(self.first_accuracy),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> str:
        """Continue with the same images from the step after the last snapshot.

        A state that cannot be read raises any exception, and changes nothing.

        Returns:
            A warning if other images were given, else an empty text.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"its version is {state.get('version')!r}, expected {STATE_VERSION}")
        monitor, given = self._monitor_of(ProbeBatch.from_state_dict(state["monitor"]["probe"])), self.monitor
        monitor.load_state_dict(state["monitor"])
        last_step, archive, run = state["last_step"], state["archive"], state["run"]
        if not isinstance(last_step, (int, type(None))) or not isinstance(archive, (str, type(None))):
            raise ValueError(f"last_step={last_step!r}, archive={archive!r}: expected a number and a folder's name")
        self.monitor, self.resumed, self.archive = monitor, True, ArchiveId(archive, run)
        first = {str(role): float(value) for role, value in state.get("first_accuracy", {}).items()}
        self.first_accuracy.clear()
        self.first_accuracy.update(first)  # the run's evaluation holds this dictionary
        self.schedule.set_last_step(last_step)
        self.schedule.postpone(int(state.get("not_before", 0)))
        if given is None or given.probe.has_same_images_as(monitor.probe):
            return ""
        return (
            f"the probe images of the checkpoint are shown ({', '.join(monitor.probe.names)}) and not those of the "
            "probe argument, so that maps can be compared over the whole run"
        )

    def _monitor_of(self, probe: ProbeBatch) -> AttentionMonitor:
        given = self.options.forward
        ways = FORWARD_OPTIONS if given is None else (ForwardOption(given),)
        forward = [replace(way, forward=partial(self._call, way.forward)) for way in ways]
        return self.options.monitor(probe, forward=forward, or_mean=True, distributed=self._distributed, alone=True)

    def _call(self, forward: Forward, model: nn.Module, images: Tensor) -> Any:
        """Call a model by ``forward``, through the FSDP units around it if there are any."""
        return forward_within(model if self.root is None else self.root, forward)(model, images)
