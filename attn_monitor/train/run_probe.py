"""`RunProbe`: the images of one run, found in its data or in a batch, and compared with what enters the models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from attn_monitor.distributed import RankZero
from attn_monitor.errors import ForwardError, NoImagesError, ProbeError
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.train.backbone_inputs import BackboneInputs
from attn_monitor.train.cost import Cost
from attn_monitor.train.kept import Kept
from attn_monitor.train.probe_search import what_to_watch
from attn_monitor.train.run_errors import RunErrors
from attn_monitor.train.targets import FindTargets

BATCHES = 8  # to observe at most in search of images that enter the models


class RunProbe:
    """Find the images to watch, on rank zero for all processes, and compare them with what the models receive.

    Args:
        kept: gets the images.
        rank_zero: decides for all processes.
        errors: of the run.
        cost: of the run.
    """

    def __init__(self, kept: Kept, rank_zero: RankZero, errors: RunErrors, cost: Cost) -> None:
        self._kept, self._rank_zero, self._errors, self._cost = kept, rank_zero, errors, cost
        self._is_known = False  # whether the images are known to be what the models receive
        self._batches = 0  # observed so far
        self._present: BackboneInputs | None = None  # hooks on the present batch

    def find(self, find: Callable[[], ProbeBatch | None]) -> None:
        """Watch the images that rank zero finds, unless there are some already."""
        if self._kept.monitor is None and (probe := self._rank_zero.run(find)) is not None:
            self._kept.watch(probe)

    def adopt(self, find: Callable[[], ProbeBatch | None], known: Callable[[], bool]) -> None:
        """Watch the images that rank zero finds in the run's data; ``known`` is whether models receive them as such.

        After a failure, those of the first training batch are watched.
        """

        def adopt() -> None:
            self.find(find)
            self._is_known = self._rank_zero.run(known)

        with self._cost.of_discovery():
            self._errors.attempt("finding images of the data", adopt)

    def ensure(self, find: Callable[[], ProbeBatch], step: int, targets: FindTargets, batch: Any) -> bool:
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

        def find_or_observe() -> None:
            try:
                self.find(find)
            except NoImagesError:
                with targets() as found:
                    if not self._observe(found.models.values(), batch):
                        raise

        found = self._errors.attempt("taking images of a batch", find_or_observe)
        if not found and not self._errors.searches_again():
            self._kept.schedule.set_last_step(step)
        self._errors.report()
        return self._kept.monitor is not None

    def observe_first(self, models: Iterable[nn.Module], batch: Any) -> bool:
        """Observe what enters the models after a first snapshot, unless that is known; return whether that is done."""
        return not self._is_known and not self._kept.resumed and self._observe(models, batch)

    def await_entering(self, error: ForwardError | ProbeError, models: Iterable[nn.Module], batch: Any) -> bool:
        """Drop images of the run's data that the models refuse, as its steps may turn, stack or clean them.

        Those that enter the models in the next step are watched then.

        Returns:
            Whether that is done; not where the images were given, models are known to receive them, or the error is
            of another kind, such as a forward that is random.
        """
        if isinstance(error, ForwardError) and error.batch is None:
            return False
        if self._kept.options.probe.are_given or self._is_known or self._kept.resumed:
            return False
        if not self._observe(models, batch):
            return False
        self._kept.monitor = None
        return True

    @property
    def is_observing(self) -> bool:
        """Whether hooks are on the models."""
        return self._present is not None

    def compare(self) -> bool:
        """Remove the hooks, and watch what has entered the models if that was other images; return whether it was.

        What is wrong with images that the user gave is noted, and these are kept.
        """
        seen, kept = self.stop(), self._kept
        if seen is None:
            return False
        watched, given = None if kept.monitor is None else kept.monitor.probe, kept.options.probe.are_given
        probe, text = self._rank_zero.run(lambda: what_to_watch(watched, seen, given=given))
        if text:
            self._errors.failures.note(text)
        if probe is not None:
            self._is_known = True
            kept.watch(probe)
            kept.schedule.set_last_step(None)
        return probe is not None

    def stop(self) -> BackboneInputs | None:
        """Remove the hooks, and return what they have seen; None if nothing was observed."""
        seen, self._present = self._present, None
        if seen is not None:
            seen.stop()
        return seen

    def note_missing(self) -> None:
        """At the end of a run, note why it was not watched if no images were found."""
        if self._kept.monitor is None and self._batches:
            self._errors.failures.note(
                "attention was not watched in this run: its batches hold no floating-point images, such as (batch, "
                "channels, height, width), and none entered the models as they were called. Pass probe= a folder, a "
                "tensor or a ProbeBatch"
            )

    def _observe(self, models: Iterable[nn.Module], batch: Any) -> bool:
        """Observe what enters the models in the next step; False, in all processes alike, if that is not possible."""
        self._batches += 1
        if self._batches > BATCHES:
            return False
        count, root = self._kept.options.probe.count, self._kept.root
        inputs = BackboneInputs(models if self._rank_zero.is_here else (), batch, count, root)
        self._present = inputs if self._rank_zero.run(lambda: inputs.can_see) else None
        return self._present is not None
