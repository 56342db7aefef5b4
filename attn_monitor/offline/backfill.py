"""`attn-monitor backfill`: the timeline of a run from the checkpoints that it has left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import ArchiveError
from attn_monitor.measure.metrics import Captured, Measured
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.offline.checkpoint_folder import Checkpoint, checkpoint_files, read_checkpoint, roles_in
from attn_monitor.offline.checkpoints import load_checkpoint
from attn_monitor.offline.models import load_model
from attn_monitor.offline.results import progress, tell, writing_to
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.publish.background import Patience
from attn_monitor.publish.failures import Failures
from attn_monitor.publish.publisher import Publisher
from attn_monitor.record.archive import load_step, snapshot_path, snapshot_paths, step_of
from attn_monitor.record.folder_claim import Claim, claim_to_fill
from attn_monitor.record.npz import remove_unfinished
from attn_monitor.record.snapshot import AttentionSnapshot

LoggerName = Literal["tensorboard", "wandb", "none"]
Tell = Callable[[str], None]

PATIENCE = 600.0  # seconds that a logger may take for one step's pictures: no training waits for it
RESTORED = ("entropy", "student_teacher_divergence")  # what health flags follow over several snapshots


@dataclass(frozen=True)
class Backfilled:
    """The archive, the steps that were added to it and those that were there, and why some checkpoints are left out."""

    archive: Path
    added: tuple[int, ...]
    there: tuple[int, ...]
    left_out: Mapping[Path, str]


def backfill_run(
    checkpoints: str | Path,
    model: nn.Module,
    monitor: AttentionMonitor,
    out: str | Path,
    *,
    key: str | None = None,
    loggers: LoggerName | Sequence[Any] = "tensorboard",
    scale: str = "uniform",
    tell: Tell = tell,
) -> Backfilled:
    """Add what a callback would have recorded at the checkpoints' steps to the archive in ``out``, and log it.

    ``model`` is a backbone, into which the weights of each checkpoint are loaded; ``monitor``, a new one, has the probe
    and says what is looked at. ``loggers`` are made in ``out``, or those of the caller. Steps that are in the archive
    are skipped. A checkpoint that cannot be read is told and left out. Raises `ArchiveError` where the archive is of
    other images or layers, or in use, and `AttentionError` where the model's attention cannot be read.
    """
    archive = Path(out) / "attn_monitor"
    left_out: dict[Path, str] = {}

    def leave_out(path: Path, error: Exception) -> None:
        left_out[path] = str(error)
        tell(f"left out: {error}")

    found = _by_step(Path(checkpoints), leave_out, tell)
    with _claimed(archive, monitor.probe) as claim:
        done = _readable(archive, tell)
        there, missing = sorted(found.keys() & done.keys()), sorted(found.keys() - done.keys())
        past = [step for step in sorted(done) if missing and step < missing[0]]
        for step in past:
            _remember(monitor, load_step(done[step]))
        ahead = sorted({step for step in done if missing and step > missing[0]}.union(missing))
        with (
            _opened(loggers if missing else (), Path(out), claim) as opened,
            _publishing(opened, monitor, archive, scale, tell) as publish,
        ):
            backbones = _Backbones(model, key, tell, () if monitor.previous is None else monitor.previous.roles)
            for step in progress(ahead, "backfilling"):
                if step in done:
                    _remember(monitor, load_step(done[step]))
                    continue
                try:
                    models = backbones.load(found[step])
                except (OSError, ValueError) as error:
                    leave_out(found[step].path, error)
                    continue
                before = {} if monitor.previous is None else monitor.previous.layers
                snapshot = monitor.snapshot(models, step=step, epoch=found[step].epoch)
                _check_alike(archive, before, snapshot.layers)
                publish(snapshot)
    added = [step for step in missing if snapshot_path(archive, step).exists()]
    for step in missing:
        if step not in added and found[step].path not in left_out:
            leave_out(found[step].path, OSError(f"step {step} could not be written to {archive}"))
    return Backfilled(archive, tuple(added), tuple(there), left_out)


def backfill(
    checkpoints: str,
    *,
    model: str,
    probe: str,
    out: str,
    key: str | None = None,
    logger: LoggerName = "tensorboard",
    size: int | tuple[int, int] = 224,
    num_images: int = 8,
    masks: str | None = None,
    layers: Any = -1,
    query: Any = "cls",
    threshold: float = 0.6,
    scale: str = "uniform",
    metrics: Any = None,
    device: str = "cpu",
) -> None:
    """Make the timeline of a run from its checkpoints: snapshots, metrics, health flags, panels, as if it was watched.

    Steps that are in the archive already are skipped, so that it can be repeated while a run goes on. A teacher that
    the module itself updates at the end of a batch is one update older in checkpoints than in live snapshots, as
    Lightning saves before that.
    For example: attn-monitor backfill checkpoints --model timm:vit_small_patch16_224 --probe photos --out runs/again

    Args:
        checkpoints: a folder of checkpoints, in order of Lightning's global_step, else of the numbers in their names.
        model: the backbone: timm:NAME, hf:NAME, torchvision:NAME, or package.module:callable.
        probe: a folder of images, or the probe.npz of an archive, to look at the same images again.
        out: the run's log directory, in which event files and the archive attn_monitor are written.
        key: what to take from the checkpoints, such as student.backbone; without it student and teacher, where both
            are there.
        logger: "tensorboard", "wandb", or "none": then the latest pictures are files in the archive.
        size: size of images from a folder in pixels, one number or [height, width].
        num_images: how many images of a folder.
        masks: folder of ground-truth masks, PNGs with the images' names.
        layers: index, module path, list of these, or "all".
        query: "cls", "mean", a token index, or [row, col] of a patch.
        threshold: share of attention mass inside the outline.
        scale: "uniform" (comparable) or "minmax" (each map for itself).
        metrics: names of metrics; by default all but distance, "all" for that too.
        device: where the model runs, such as cuda.
    """
    if Path(probe).suffix == ".npz":
        images = ProbeBatch.load(probe)
    else:
        images = ProbeBatch.from_path(probe, size=size, num_images=num_images, masks=masks)
    monitor = AttentionMonitor(images, layers=layers, query=query, threshold=threshold, metrics=metrics, or_mean=True)
    backbone = load_model(model).to(device)
    filled = backfill_run(checkpoints, backbone, monitor, out, key=key, loggers=logger, scale=scale)
    for step in filled.added:
        print(snapshot_path(filled.archive, step))
    print(f"{filled.archive}: {len(filled.added)} snapshots added, {len(filled.there)} were there")
    if filled.left_out:
        names = ", ".join(path.name for path in filled.left_out)
        raise ArchiveError(f"{len(filled.left_out)} checkpoints are left out: {names}")


def _by_step(folder: Path, leave_out: Callable[[Path, Exception], None], tell: Tell) -> dict[int, Checkpoint]:
    """Checkpoints by step, of two with one step the first by name."""
    found: dict[int, Checkpoint] = {}
    for path in progress(checkpoint_files(folder), "looking at checkpoints"):
        try:
            checkpoint = read_checkpoint(path)
        except (OSError, ValueError) as error:
            leave_out(path, error)
            continue
        first = found.setdefault(checkpoint.step, checkpoint)
        if first is not checkpoint:
            tell(f"{path} is of step {checkpoint.step}, as is {first.path.name}, which is taken")
    return found


def _readable(archive: Path, tell: Tell) -> dict[int, Path]:
    """Snapshots of the archive by step; one that cannot be read is told, and may be made again."""
    readable = {}
    for path in snapshot_paths(archive):
        try:
            load_step(path)
        except (ArchiveError, OSError) as error:
            tell(f"not counted as there: {error}")
        else:
            readable[step_of(path)] = path
    return readable


class _Backbones:
    """One model for each role of the checkpoints: the roles of the archive's past, else of the first checkpoint."""

    def __init__(self, model: nn.Module, key: str | None, tell: Tell, roles: Sequence[str]) -> None:
        self._model, self._key, self._tell, self._roles = model, key, tell, set(roles)
        self._by_role: dict[str, nn.Module] = {}

    def load(self, checkpoint: Checkpoint) -> dict[str, nn.Module]:
        """Role to model with this checkpoint's weights; ValueError where these do not fit."""
        known = self._model.state_dict()
        places: Mapping[str, str | None] = roles_in(checkpoint, known, self._key) or {"backbone": self._key}
        models = {role: self._by_role.get(role) or copy.deepcopy(self._model) for role in places}
        for role, model in models.items():
            loaded = load_checkpoint(model, str(checkpoint.path), key=places[role])
            if role not in self._by_role:
                self._tell(f"{role}: {loaded}")
        if self._roles and models.keys() != self._roles:
            raise ArchiveError(
                f"{checkpoint.path}: holds weights of {', '.join(models)}, and the checkpoints before it of "
                f"{', '.join(sorted(self._roles))}"
            )
        self._roles = set(models)
        self._by_role = models
        return models


@contextmanager
def _claimed(archive: Path, probe: ProbeBatch) -> Iterator[Claim]:
    """The archive for this process alone, where it is empty or of the same images."""
    with writing_to(archive):
        claim = claim_to_fill(archive)
    if claim is None:
        raise ArchiveError(f"{archive}: another process writes here. Wait for its end, or pass another folder")
    try:
        remove_unfinished(archive)
        stored = archive / "probe.npz"
        if stored.exists() and not probe.has_same_images_as(ProbeBatch.load(stored)):
            raise ArchiveError(f"{archive}: is of other images; pass --probe {stored}, or another folder as --out")
        yield claim
    finally:
        claim.release()


@contextmanager
def _opened(loggers: LoggerName | Sequence[Any], out: Path, claim: Claim) -> Iterator[Sequence[Any]]:
    """Loggers that write to a folder, closed at the end, or those that are given."""
    if loggers == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(out)) as writer:
            yield [writer]
    elif loggers == "wandb":
        import wandb

        with wandb.init(dir=out, id=claim.run, name=out.resolve().name, resume="allow") as run:
            yield [run]
    else:
        yield () if isinstance(loggers, str) else loggers


@contextmanager
def _publishing(
    loggers: Sequence[Any], monitor: AttentionMonitor, archive: Path, scale: str, tell: Tell
) -> Iterator[Callable[[AttentionSnapshot], None]]:
    """A function that publishes a snapshot while the next one is taken; pictures are waited for, not left out."""
    failures = Failures()
    publisher = Publisher(
        loggers,
        monitor.probe,
        folder=archive,
        style=DrawingOptions(monitor.threshold, scale),
        every_layer=monitor.draws_every_layer,
        history=monitor.history,
        failures=failures,
        patience=Patience(PATIENCE),
    )

    def publish(snapshot: AttentionSnapshot) -> None:
        publisher.drain(PATIENCE)
        publisher.publish(snapshot)
        failures.report(tell)

    finished = False
    try:
        yield publish
        publisher.drain(PATIENCE)
        finished = True
    finally:
        publisher.close(finish=finished)
        failures.report(tell)


def _remember(monitor: AttentionMonitor, snapshot: AttentionSnapshot) -> None:
    """Make a snapshot of the archive the monitor's past, what its health flags follow included."""
    measured: Measured = {key: {} for key in snapshot.layers}
    for (role, layer), values in measured.items():
        for metric in RESTORED:
            of_heads = [v for k, v in snapshot.metrics.items() if k[:3] == (role, layer, metric) and k.head is not None]
            if of_heads:
                values[metric] = torch.tensor([of_heads])  # (1, H): means over images, which is what is followed
    monitor.health.examine(snapshot.step, snapshot.layers, measured)
    monitor.remember(snapshot)


def _check_alike(archive: Path, before: Captured, now: Captured) -> None:
    """Raise `ArchiveError` where an archive of one model would go on with another, or with other layers."""
    if not before:
        return
    facts = [
        {f"{role}, layer {layer}": (a.rows.shape[1], a.grid, a.query) for (role, layer), a in layers.items()}
        for layers in (before, now)
    ]
    if facts[0] != facts[1]:
        told = ["; ".join(f"{k}: {h} heads, grid {g}, query {q}" for k, (h, g, q) in f.items()) for f in facts]
        raise ArchiveError(f"{archive}: holds {told[0]}; this would add {told[1]}. Pass another folder as --out")
