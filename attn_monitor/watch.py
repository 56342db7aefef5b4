"""`Watch`: attention maps from a training loop of one's own, in three lines and as safe as in Lightning."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from attn_monitor import distributed
from attn_monitor.capture.backbones import find_backbones
from attn_monitor.capture.forward import Forward, is_sharded
from attn_monitor.capture.recorder import Verify, check_verify
from attn_monitor.capture.selection import Layers, QuerySpec, check_layers, check_query
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import AttentionError, NoAttentionError, ProbeError, UnsupportedAttentionError
from attn_monitor.measure.health import HealthLimits
from attn_monitor.measure.metrics import select_metrics
from attn_monitor.monitor import AttentionMonitor, check_threshold
from attn_monitor.publish.failures import Failures
from attn_monitor.publish.publisher import Publisher
from attn_monitor.record.archive import set_aside, written_between
from attn_monitor.record.claim import Claim, claim_again, claim_free
from attn_monitor.record.probe import ProbeBatch
from attn_monitor.record.snapshot import AttentionSnapshot
from attn_monitor.train import reports as telling
from attn_monitor.train.arguments import OnError, check_heads, check_on_error, check_probe, check_statistics
from attn_monitor.train.probe_search import TRAINING_CAPTION, probe_from_batch, probe_from_loaders
from attn_monitor.train.schedule import Schedule

TAKING = "taking a snapshot"
DATA = (Dataset, DataLoader)


class Watch:
    """Looks at models while they train, and writes what it sees to loggers and to an archive::

        watch = Watch({"student": student, "teacher": teacher}, loader, loggers=[writer], folder="runs/1")
        for step, batch in enumerate(loader):
            watch.step(step)  # that many optimizer steps are done
            ...
        watch.close(step + 1)

    What goes wrong is a warning, and training goes on; only ``on_error="raise"`` ends it. In a process group the first
    process looks and the others do nothing.

    Args:
        models: a module, in which backbones and their roles are searched, or role to module.
        probe: a folder, a tensor of normalised images, a `ProbeBatch`, or a data set or its loader, of which evenly
            spaced images are taken. None takes the first ``batch`` that `step` is given.
        loggers: TensorBoard ``SummaryWriter``, W&B runs, or anything with ``log_metrics``.
        folder: of the run; the archive is in ``attn_monitor`` below it. None: no archive.
        every_n_train_steps: None: ``total_steps / 50``, or ever wider distances where that is not given either.
        layers, query, threshold, metrics, health, verify, num_images, image_size, mean, std, scale, heads: as in
            `AttentionMapCallback`.
        forward: calls a model when ``model(images)`` is not right.
        on_error: "warn" or "raise".
    """

    def __init__(
        self,
        models: nn.Module | Mapping[str, nn.Module],
        probe: str | os.PathLike[str] | Tensor | ProbeBatch | Dataset[Any] | DataLoader[Any] | None = None,
        *,
        loggers: Sequence[Any] = (),
        folder: str | os.PathLike[str] | None = None,
        every_n_train_steps: int | None = None,
        total_steps: float | None = None,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        threshold: float = 0.6,
        metrics: Sequence[str] | str | None = None,
        health: HealthLimits = HealthLimits(),
        verify: Verify = True,
        forward: Forward | None = None,
        num_images: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: str = "uniform",
        heads: Sequence[int] | None = None,
        on_error: OnError = "warn",
    ) -> None:
        self.on_error, self.statistics = check_on_error(on_error), check_statistics(probe, mean, std)
        if not loggers and folder is None:
            raise ValueError("loggers=(), folder=None: expected a place to write to, such as folder='runs/1'")
        self.models, self.probe, self.loggers = models, probe, list(loggers)
        self.folder = None if folder is None else Path(folder)
        self.num_images, self.image_size = check_probe(probe, num_images, image_size, None, data=DATA)
        self.schedule, self.total_steps = Schedule(every_n_train_steps), total_steps or float("inf")
        self.schedule.start(self.total_steps)
        self.style = DrawingOptions(threshold, scale, check_heads(heads))
        self._settings: dict[str, Any] = {
            "layers": check_layers(layers), "query": check_query(query), "threshold": check_threshold(threshold),
            "metrics": select_metrics(metrics), "health": health, "verify": check_verify(verify), "forward": forward,
        }  # fmt: skip
        self.monitor: AttentionMonitor | None = None
        if isinstance(probe, (ProbeBatch, Tensor, str, os.PathLike)):
            self._use(ProbeBatch.of(probe, size=self.image_size, num_images=self.num_images, mean=mean, std=std))
        self.active = distributed.is_first()
        self._failures = Failures('it is tried again; on_error="raise" shows the traceback')
        self._publisher: Publisher | None = None
        self._claim: Claim | None = None
        self._archive: tuple[str, str] | None = None  # name of the folder and id of the run that wrote it
        self._taken, self._looked, self._blocked, self._started = 0, 0.0, 0.0, time.perf_counter()

    def step(self, step: int, *, batch: Any = None, epoch: int = 0) -> AttentionSnapshot | None:
        """Call it between two optimizer steps with how many are done; the snapshot, where one was due and taken."""
        return self._look(step, batch, epoch) if self.schedule.due(step) else None

    def close(self, step: int | None = None) -> None:
        """Take a last snapshot at this step, unless there is one, and write everything. Nothing is watched after."""
        if step is not None and step != self.schedule.last_step:
            self._look(step, None, 0)
        publisher, self._publisher = self._publisher, None
        if publisher is not None and self.monitor is not None:
            started = time.perf_counter()
            publisher.close()
            waited, wall = time.perf_counter() - started, time.perf_counter() - self._started
            text = telling.cost_text(self._taken, self._looked, self._blocked, wall, waited, publisher.seconds)
            telling.inform(f"attn_monitor: {text}")
        if self._claim is not None:
            self._claim.release()
        self._report()
        self.active = False

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: tensors and plain values, loadable with ``weights_only=True``."""
        if self.monitor is None:
            return {}
        state = self.monitor.state_dict()
        return {"monitor": state, "last_step": self.schedule.last_step, "archive": self._archive}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same images, in the same archive, from the step after the last snapshot."""
        if not state:
            return
        try:
            self._use(ProbeBatch.from_state_dict(state["monitor"]["probe"]))
            assert self.monitor is not None
            self.monitor.load_state_dict(state["monitor"])
            archive = state["archive"]
            self.schedule.last_step, self._archive = state["last_step"], None if archive is None else tuple(archive)
        except Exception as error:  # another version's may hold anything
            self.monitor, self.schedule.last_step, self._archive = None, None, None
            self._failures.failed("reading the state of a checkpoint", error)
            self._report()

    def _use(self, probe: ProbeBatch) -> None:
        self.monitor = AttentionMonitor(probe, or_mean=True, **self._settings)

    def _look(self, step: int, batch: Any, epoch: int) -> AttentionSnapshot | None:
        if not self.active:
            return None
        started = time.perf_counter()
        taken: list[AttentionSnapshot] = []
        if self._failures.pause(TAKING):
            self._failures.lost(TAKING, step)
        else:
            try:
                take = partial(self._take, step, batch, epoch)
                if not self._failures.attempt(TAKING, lambda: taken.append(take()), let=(AttentionError, ProbeError)):
                    self._failures.lost(TAKING, step)
            except (AttentionError, ProbeError) as error:
                self._fail(step, error)
        self.schedule.taken(step)
        self._blocked += time.perf_counter() - started
        self._report()
        return taken[0] if taken else None

    def _fail(self, step: int, error: Exception) -> None:
        """A model that cannot be read at first is left alone; later it is a failure like others."""
        if self._taken or self.on_error == "raise":
            self._failures.failed(TAKING, error)
            self._failures.lost(TAKING, step)
        else:
            telling.warn(f"attn_monitor: attention is not watched in this run. {str(error).rstrip('.')}")
            self.active = False

    def _take(self, step: int, batch: Any, epoch: int) -> AttentionSnapshot:
        models, paths = self._targets()
        first = self._publisher is None
        started = time.perf_counter()
        if self.monitor is None:
            self._adopt(batch, next(iter(models.values())))
        assert self.monitor is not None
        if first:
            if distributed.is_on() and any(map(is_sharded, models.values())):
                raise UnsupportedAttentionError(
                    "Watch looks in the first process alone, and this model's parameters are spread over several. Use "
                    "AttentionMonitor(distributed=True) with forward_within, in every process"
                )
            self.monitor.check(models)
            self.monitor.check_heads(self.style.heads)
            for text in self.monitor.left_out():
                self._failures.note(text)
            self._open(step)
            looked = time.perf_counter() - started
            self._looked, self._blocked, started = self._looked + looked, self._blocked - looked, time.perf_counter()
        snapshot = self.monitor.snapshot(models, step=step, epoch=epoch)
        self._taken += 1
        assert self._publisher is not None
        if first:
            self._tell(paths, time.perf_counter() - started)
        self._publisher.publish(snapshot)
        return snapshot

    def _targets(self) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """Role to backbone, and to its path."""
        if isinstance(self.models, nn.Module):
            paths = find_backbones(self.models)
            return {role: self.models.get_submodule(path) for role, path in paths.items()}, paths
        paths = {role: _only_backbone(model) for role, model in self.models.items()}
        return {role: model.get_submodule(paths[role]) for role, model in self.models.items()}, paths

    def _adopt(self, batch: Any, model: nn.Module) -> None:
        source, probe, caption = self.probe, None, TRAINING_CAPTION
        if isinstance(source, DATA):
            loader = source if isinstance(source, DataLoader) else DataLoader(source)
            caption = TRAINING_CAPTION if _shuffles(loader) else "original"
            probe = probe_from_loaders(loader, self.num_images, model, caption=caption)
            batch = next(iter(loader)) if probe is None and batch is None else batch
        probe = probe or probe_from_batch(batch, self.num_images, caption=caption)
        self._use(probe.with_statistics(*self.statistics) if self.statistics else probe)

    def _open(self, step: int) -> None:
        """Where to write: the folder of this run's past, else one that is nobody's."""
        assert self.monitor is not None
        folder = None
        if self.folder is not None:
            known = self._archive
            claim = None if known is None else claim_again(self.folder / known[0], known[1])
            again, claim = claim is not None, claim or claim_free(self.folder, "attn_monitor")
            if claim.note:
                telling.inform(f"attn_monitor: {claim.note}")
            self._claim, self._archive, folder = claim, (claim.folder.name, claim.run), claim.folder
            if again and self.schedule.last_step is not None:
                self._catch_up(folder, self.schedule.last_step, step)
        self._publisher = Publisher(
            self.loggers,
            self.monitor.probe,
            folder=folder,
            style=self.style,
            every_layer=self.monitor.draws_every_layer,
            history=self.monitor.history,
            failures=self._failures,
        )

    def _catch_up(self, folder: Path, last: int, step: int) -> None:
        """Of a resumed run: what was taken between the checkpoint and now is known, and what comes later is not."""
        assert self.monitor is not None
        if told := set_aside(folder, step):
            self._failures.note(told)
        for snapshot in written_between(folder, last, step - 1, self.monitor.probe.names, self._failures.note):
            self.monitor.remember(snapshot)

    def _tell(self, paths: Mapping[str, str], seconds: float) -> None:
        assert self.monitor is not None
        assert self._publisher is not None
        text = telling.found_text(
            self.monitor.found(),
            paths,
            self.monitor.probe,
            schedule=str(self.schedule),
            seconds=seconds,
            count=self.schedule.count(self.total_steps),
            folder=self._publisher.folder,
        )
        telling.inform(f"attn_monitor: {text}")
        settings = {**self._settings, "every_n_train_steps": self.schedule.every_n_train_steps}
        self._publisher.settings = f"{text}\n\n{telling.settings_text([*settings.items()])}"

    def _report(self) -> None:
        warn = partial(_warn_of, "attn_monitor: ")
        self._failures.report(warn, reraise=self.on_error == "raise")


def _warn_of(prefix: str, text: str) -> None:
    telling.warn(f"{prefix}{text}")


def _shuffles(loader: DataLoader[Any]) -> bool:
    """Whether it is for training: what is shuffled is mostly augmented. accelerate wraps the samplers."""
    batches: Any = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return not isinstance(getattr(batches, "sampler", loader.sampler), SequentialSampler)


def _only_backbone(model: nn.Module) -> str:
    """Path of the one backbone in a module, such as a wrapper for multi-crops; the module where none is found."""
    try:
        found = find_backbones(model)
    except NoAttentionError:
        return ""
    return next(iter(found.values())) if len(found) == 1 else ""
