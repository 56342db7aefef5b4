"""Make the timeline of a run from its checkpoints: snapshots, metrics, health flags and panels, as if it was watched.

Steps that the archive already has are skipped, so that it can be repeated while a run goes on, with the same model,
probe and settings; others are refused. A teacher that the module itself updates at the end of a batch is one update
older in checkpoints than in live snapshots, as Lightning saves before that.

Example: attn-monitor backfill checkpoints --model timm:vit_small_patch16_224 --probe photos --out runs/again
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from attn_monitor.background.failures import Failures
from attn_monitor.capture.image_channels import image_channels
from attn_monitor.commands.support.archive_to_fill import Notify, archive_to_fill, remember
from attn_monitor.commands.support.devices import check_taken, choose_device, fitting_size, move_to, naming_sizes
from attn_monitor.commands.support.loggers import LoggerName, opened, publishing
from attn_monitor.commands.support.results import check_all_read, notify, progress
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import ArchiveError
from attn_monitor.measurements import HealthFlag, Metrics
from attn_monitor.metric_options import MetricOptions
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.labelled import EvaluationOptions, Labelled
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.archive import load_step, snapshot_path
from attn_monitor.snapshot import Snapshot
from attn_monitor.train.evaluation import KNN, Evaluation
from attn_monitor.weights.models import load_model
from attn_monitor.weights.run_checkpoints import Checkpoint, RoleModels, checkpoint_files, read_checkpoint


@dataclass(frozen=True)
class Backfilled:
    """The result of `backfill_run`.

    Attributes:
        archive: the folder with the snapshots.
        added: steps that were added to it.
        there: steps of checkpoints that it already had.
        left_out: checkpoint to the reason why it was left out.
    """

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
    allow_missing: bool = False,
    trust: bool = False,
    loggers: LoggerName | Sequence[Any] = "tensorboard",
    drawing: DrawingOptions = DrawingOptions(),
    evaluation: EvaluationOptions | Labelled | None = None,
    notify: Notify = notify,
) -> Backfilled:
    """Add what a callback would have recorded at the checkpoints' steps to an archive, and log it.

    Steps that the archive has are skipped. A checkpoint that cannot be read is left out, with a note.

    Args:
        checkpoints: a folder of checkpoints, or one of them.
        model: a backbone, into which the weights of each checkpoint are loaded by `load_checkpoint`.
        monitor: a new one, with the probe, layers and metrics.
        out: the run's log directory; the archive is its folder attn_monitor.
        key: as in `load_checkpoint`.
        allow_missing: as in `load_checkpoint`.
        trust: as in `load_checkpoint`.
        loggers: "tensorboard" or "wandb" to open one in ``out``, "none", or loggers of the caller.
        drawing: how to draw, with the threshold of the monitor.
        evaluation: labelled images to evaluate the models on, as in `AttentionMapCallback`; a folder is read in the
            size and with the normalisation of the probe.
        notify: takes notes, one line each; by default they go to stderr.

    Returns:
        The archive, and which steps were added to it.

    Raises:
        FileNotFoundError: there are no checkpoints.
        ArchiveError: the archive is of other images, layers or settings, or in use.
        AttentionError: the model's attention cannot be read.
    """
    left_out: dict[Path, str] = {}

    def leave_out(path: Path, error: Exception) -> None:
        left_out[path] = str(error)
        notify(f"left out: {error}")

    options, failures, first = EvaluationOptions.of(evaluation), Failures(), dict[str, float]()
    evaluate = None if options is None else Evaluation(options, first, failures, notify)
    found = _by_step(Path(checkpoints), trust, leave_out, notify)
    settings = _settings(model, monitor, key, options)
    with archive_to_fill(Path(out) / "attn_monitor", monitor.probe, settings, notify) as archive, ExitStack() as stack:
        there = archive.snapshots
        missing = sorted(found.keys() - there.keys())
        needed = sorted({step for step in there if missing and step < missing[-1]}.union(missing))
        models = RoleModels(model, notify, key, allow_missing=allow_missing, trust=trust)
        publish: Callable[[Snapshot], None] | None = None
        for step in progress(needed, "backfilling"):
            if step in there:
                before = load_step(there[step])
                remember(monitor, before)
                knn = {k.role: value for k, value in before.metrics.items() if k.metric == KNN}
                first.update({role: value for role, value in knn.items() if role not in first})
                continue
            try:
                loaded = models.load(found[step])
            except (OSError, ValueError) as error:
                leave_out(found[step].path, error)
                continue
            others, flags = Metrics(), tuple[HealthFlag, ...]()
            if evaluate is not None:
                monitor.check(loaded)
                others, flags = evaluate(monitor, loaded, step, last=step == needed[-1])
                failures.report(notify)
            snapshot = monitor.snapshot(loaded, step=step, epoch=found[step].epoch, others=others, flags=flags)
            archive.check(snapshot)
            if publish is None:  # loggers are opened where there is something to log
                taking = stack.enter_context(opened(loggers, Path(out), archive.run))
                archive.note_settings()
                publish = stack.enter_context(publishing(taking, monitor, archive.folder, drawing, notify))
            publish(snapshot)
    added = [step for step in missing if snapshot_path(archive.folder, step).exists()]
    for step in missing:
        if step not in added and found[step].path not in left_out:
            leave_out(found[step].path, OSError(f"step {step} could not be written to {archive.folder}"))
    return Backfilled(archive.folder, tuple(added), tuple(sorted(found.keys() & there.keys())), left_out)


def backfill(
    checkpoints: str,
    *,
    model: str,
    probe: str,
    out: str,
    key: str | None = None,
    allow_missing: bool = False,
    trust: bool = False,
    logger: Literal["tensorboard", "wandb", "none"] = "tensorboard",
    size: int | tuple[int, ...] | None = None,
    num_images: int = 8,
    masks: str | None = None,
    bands: tuple[int, ...] | None = None,
    large_images: bool = False,
    layers: Any = -1,
    query: Any = "cls",
    metrics: Any = None,
    features: bool = False,
    gram_step: int | None = None,
    drawing: DrawingOptions = DrawingOptions(),
    evaluation: str | None = None,
    device: str = "cpu",
) -> None:
    """Run `attn-monitor backfill`, which this module describes.

    Args:
        checkpoints: a folder of checkpoints, in order of Lightning's global_step, else of the numbers in their names.
        model: the backbone: timm:NAME, hf:NAME_OR_DIR, torchvision:NAME, hub:REPO_OR_DIR:NAME, package.module:factory
            or package.module:factory(arguments).
        probe: a folder of images, or the probe.npz of an archive, to look at the same images again.
        out: the run's log directory, in which event files and the archive attn_monitor are written.
        key: what to take from the checkpoints, such as student.backbone; without it student and teacher, where both
            are there.
        allow_missing: accept checkpoints that lack a part of the backbone, which stays at random.
        trust: unpickle what else the checkpoints hold, which can run any code; for files whose author you know.
        logger: "tensorboard", "wandb", or "none": then the latest pictures are files in the archive.
        size: size of images from a folder in pixels, one number or [height, width], of clips and volumes [frames or
            slices, height, width]; cropped to a multiple of the patch. Without it, 224, or what the model takes where
            it refuses that.
        num_images: how many images of a folder.
        masks: folder of ground-truth masks, PNGs with the images' names.
        bands: which channels pictures show, one in grey or three in red, green and blue, counted from 0.
        large_images: read images of more than Pillow's limit of 89 million pixels.
        layers: index, module path, list of these, or "all".
        query: "cls", "mean", a token index, or [row, col] of a patch.
        metrics: names of metrics; by default all but distance, "all" for that too.
        features: keep patch features in at most 32 dimensions, and measure Gram drift.
        gram_step: against the first snapshot from this step on; by default the first of all.
        drawing: how to draw; its values are options of their own.
        evaluation: a folder with a folder of images for each class, to measure kNN and a linear probe on.
        device: where the model runs, such as cuda.
    """
    chosen_device = choose_device(device)
    backbone = load_model(model)
    unreadable = list[str]()
    reading: dict[str, Any] = {"bands": bands, "large_images": large_images, "onerror": unreadable.append}
    images = probe_of(probe, backbone, size, num_images, masks, **reading)
    monitor = AttentionMonitor(
        images,
        layers=layers,
        query=query,
        threshold=drawing.threshold,
        metrics=MetricOptions(metrics, gram_step),
        or_mean=True,
        features=features,
    )
    choice: dict[str, Any] = {"key": key, "allow_missing": allow_missing, "trust": trust}
    move_to(chosen_device, backbone)
    with naming_sizes(None if Path(probe).suffix == ".npz" else probe):
        filled = backfill_run(
            checkpoints, backbone, monitor, out, loggers=logger, drawing=drawing, evaluation=evaluation, **choice
        )
    for step in filled.added:
        print(snapshot_path(filled.archive, step))
    print(f"{filled.archive}: {len(filled.added)} snapshots added, {len(filled.there)} were there")
    if filled.left_out:
        names = ", ".join(path.name for path in filled.left_out)
        raise ArchiveError(f"{len(filled.left_out)} checkpoints are left out: {names}")
    check_all_read(unreadable)


def probe_of(
    path: str,
    model: nn.Module,
    size: int | tuple[int, ...] | None,
    num_images: int,
    masks: str | None,
    *,
    bands: tuple[int, ...] | None = None,
    large_images: bool = False,
    onerror: Callable[[str], None] | None = None,
) -> ProbeBatch:
    """Load the images of a folder, in a size and with the channels that fit the model, or those of a probe.npz."""
    if Path(path).suffix != ".npz":
        fitting = fitting_size(model, size)
        channels, axes = image_channels(model, fitting)
        reading: dict[str, Any] = {"masks": masks, "bands": bands, "large_images": large_images, "onerror": onerror}
        reading |= {"channels": channels, "axes": axes}
        return ProbeBatch.from_folder(path, size=fitting, num_images=num_images, **reading)
    if not Path(path).exists():
        raise FileNotFoundError(f"probe {path}: does not exist; expected the probe.npz of an archive, or images")
    loaded = ProbeBatch.load(path)
    check_taken(model, loaded.images, f"probe {path}")
    return loaded if bands is None else loaded.with_bands(bands)


def _settings(
    model: nn.Module, monitor: AttentionMonitor, key: str | None, options: EvaluationOptions | None
) -> dict[str, Any]:
    """Return what a snapshot depends on beside its checkpoint and probe, in plain values."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": f"{type(model).__name__} of {count:,} parameters",
        "key": key,
        **{n: getattr(monitor, n) for n in ("layers", "query", "threshold", "metrics", "features", "gram_step")},
        "evaluation": None if options is None else str(options),
    }


def _by_step(
    folder: Path, trust: bool, leave_out: Callable[[Path, Exception], None], notify: Notify
) -> dict[int, Checkpoint]:
    """Return checkpoints by step; where two have one step, the first by name."""
    found: dict[int, Checkpoint] = {}
    for path in progress(checkpoint_files(folder), "looking at checkpoints"):
        try:
            checkpoint = read_checkpoint(path, trust=trust)
        except (OSError, ValueError) as error:
            leave_out(path, error)
            continue
        first = found.setdefault(checkpoint.step, checkpoint)
        if first is not checkpoint:
            notify(f"{path} is of step {checkpoint.step}, as is {first.path.name}, which is taken")
    return found
