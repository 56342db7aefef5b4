"""What each logger can take: TensorBoard, Weights & Biases, MLflow, and any other by `log_metrics` and `log_image`.

This is the only place that knows how pictures are encoded for whom and in which channel order. No logger's package is
imported unless that logger is in use. A ``name`` tells several callbacks of one run apart, see `names`.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image

from attn_monitor import functional as F
from attn_monitor.draw import canvas as drawing
from attn_monitor.measure.health import HealthFlag
from attn_monitor.measure.metrics import METRICS, metric_tag
from attn_monitor.publish.tags import renamed, titled
from attn_monitor.record.file_names import file_name
from attn_monitor.record.snapshot import AttentionSnapshot

WANDB_AXIS = "trainer/global_step"  # Lightning's own name for it
HISTOGRAM_TAG = "attn_histogram/{role}/layer{layer}/entropy"

# Of each TensorBoard writer. Only the last layout in a run is shown, so it has to hold the charts of all callbacks.
_charts: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
_charts_lock = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """A drawn picture with the tag it is logged under; encoded once, for all loggers that want it encoded."""

    tag: str
    pixels: drawing.Pixels
    caption: str

    @cached_property
    def jpeg(self) -> bytes:
        """The picture as JPEG."""
        return drawing.jpeg(self.pixels)


class PictureFolder:
    """The latest pictures as files, for runs without any logger; numbers are in the archive beside it."""

    def __init__(self, folder: Path) -> None:
        self.log_dir = folder

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def log_image(self, key: str, images: Sequence[drawing.Pixels], step: int) -> None:
        """One picture, in place of the one of the step before."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        (self.log_dir / file_name(key.replace("/", "-"), ".jpg")).write_bytes(drawing.jpeg(images[0]))


@dataclass(frozen=True)
class Overlay:
    """A photograph with mask layers that a dashboard can switch on and off: (h, w) integers and their names."""

    tag: str
    photo: drawing.Pixels
    masks: Mapping[str, np.ndarray[Any, Any]]


def kind_of(logger: Any) -> str:
    """What a logger is, by class name, so that both Lightning namespaces are known without importing either."""
    names = {base.__name__ for base in type(logger).__mro__}
    for name, kind in (
        ("TensorBoardLogger", "tensorboard"),
        ("SummaryWriter", "tensorboard"),
        ("WandbLogger", "wandb"),
        ("MLFlowLogger", "mlflow"),
        ("Run", "wandb"),
    ):
        if name in names:
            return kind
    try:
        if callable(getattr(logger, "log_image", None)):
            return "images"  # the CSV logger's too, where a subclass takes images
        if "CSVLogger" not in names and _adds_images(logger) is not None:
            return "images"
    except Exception:  # a property of somebody's logger, asked for on the training thread
        return "metrics"
    return "csv" if "CSVLogger" in names else "metrics"


def _adds_images(logger: Any) -> Callable[..., None] | None:
    """The ``add_image(tag, image, step, dataformats=…)`` of a logger or its experiment, as SummaryWriters have it."""
    for owner in (logger, getattr(logger, "experiment", None)):
        add = getattr(owner, "add_image", None)
        if callable(add):
            return cast("Callable[..., None]", add)
    return None


def takes_pictures(logger: Any) -> bool:
    """Whether `log_pictures` can do anything with this logger."""
    return kind_of(logger) not in ("metrics", "csv")


def plays_animations(logger: Any) -> bool:
    """Whether `log_animation` can do anything with this logger."""
    return kind_of(logger) in ("tensorboard", "wandb", "mlflow")


def is_bound_to_its_thread(logger: Any) -> bool:
    """Whether it must only be called on the training thread, as the run itself does.

    CSVLogger collects rows in a list that it writes and empties: called from a second thread at that moment, it loses
    the run's own rows. Others send each call on by itself.
    """
    return kind_of(logger) == "csv"


def folder_of(logger: Any) -> Path | None:
    """A folder on the disk that it writes pictures to, None where it writes to none."""
    for name in ("log_dir", "save_dir", "dir"):  # of Lightning's loggers and SummaryWriter; of W&B and MLflow; of a run
        folder = getattr(logger, name, None)
        if isinstance(folder, (str, os.PathLike)) and "://" not in str(folder):
            return Path(folder)
    return None


def size_of(logger: Any, pictures: Sequence[Picture]) -> int:
    """Bytes on disk that a logger makes of pictures, at most."""
    if kind_of(logger) == "tensorboard":
        return 2 * sum(len(picture.jpeg) for picture in pictures)  # twice, as those before may wait in its buffer
    return sum(picture.pixels.nbytes for picture in pictures)


def define_axis(logger: Any) -> None:
    """On W&B, once and before anything is logged: charts and pictures of attention are drawn over the global step.

    Lightning says so only for runs that it starts itself, and not when W&B follows TensorBoard.
    """
    if kind_of(logger) != "wandb":
        return
    run = _run(logger)
    run.define_metric(WANDB_AXIS)
    for tags in {"attn*", f"{_prefix(logger)}attn*"}:
        run.define_metric(tags, step_metric=WANDB_AXIS)


def log_scalars(logger: Any, *, metrics: Mapping[str, float], step: int) -> None:
    """Metrics by tag, to a Lightning logger, a plain TensorBoard `SummaryWriter` or a W&B run."""
    kind, named = kind_of(logger), {f"{_prefix(logger)}{tag}": value for tag, value in metrics.items()}
    if kind == "wandb":
        # Not by log_metrics, which drops the step when W&B follows TensorBoard.
        _log_row(logger, named, step)
    elif kind == "tensorboard":
        # One record for all is ten times as fast as add_scalar for each.
        _add_summary(logger, [{"tag": tag, "simple_value": value} for tag, value in named.items()], step)
    else:
        logger.log_metrics(dict(metrics), step=step)


def log_pictures(logger: Any, *, pictures: Sequence[Picture], step: int) -> None:
    """Pictures to a logger that takes them."""
    kind = kind_of(logger)
    if kind == "tensorboard":
        for picture in pictures:
            height, width = picture.pixels.shape[:2]
            _add_encoded_image(logger, picture.tag, picture.jpeg, (height, width), step)
    elif kind == "wandb":
        import wandb

        media = {p.tag: wandb.Image(p.pixels, caption=p.caption, file_type="jpg") for p in pictures}
        _log_row(logger, media, step)
    elif kind == "mlflow":
        for picture in pictures:
            key = re.sub(r"[^\w ./-]", "_", picture.tag)
            logger.experiment.log_image(logger.run_id, picture.pixels, key=key, step=step)
    elif callable(getattr(logger, "log_image", None)):
        for picture in pictures:
            logger.log_image(key=picture.tag, images=[picture.pixels], step=step)
    else:
        add = _adds_images(logger)
        assert add is not None
        for picture in pictures:
            add(picture.tag, picture.pixels, step, dataformats="HWC")


def log_overlays(logger: Any, *, overlays: Sequence[Overlay], step: int) -> None:
    """Photographs with switchable masks, where the dashboard has such a thing (W&B)."""
    if kind_of(logger) != "wandb" or not overlays:
        return
    import wandb

    def masks(overlay: Overlay) -> dict[str, Any]:
        labels = {0: "outside", 1: "attended"}
        return {
            name: {"mask_data": mask.astype(np.uint8), "class_labels": labels} for name, mask in overlay.masks.items()
        }

    _log_row(logger, {o.tag: wandb.Image(o.photo, masks=masks(o), file_type="jpg") for o in overlays}, step)


def log_flags(logger: Any, *, flags: Sequence[HealthFlag], step: int, name: str = "") -> None:
    """Health flags in words: an alert on W&B, text on TensorBoard, a file on MLflow; others have their number only."""
    text, kind = "\n".join(f"- {flag}" for flag in flags), kind_of(logger)
    if kind == "wandb":
        _run(logger).alert(title=titled("attention health", name), text=text, level="WARN")
    elif kind == "tensorboard":
        _writer(logger).add_text(renamed("attn_monitor/health", name), text, step)
    elif kind == "mlflow":
        logger.experiment.log_text(logger.run_id, text, renamed(f"attn_health/step-{step:09d}.txt", name))


def log_histograms(logger: Any, *, snapshot: AttentionSnapshot, name: str = "") -> None:
    """Distribution of the entropy over heads and images, for each role and layer (TensorBoard)."""
    if kind_of(logger) != "tensorboard":
        return
    for (role, layer), attention in snapshot.layers.items():
        values = F.entropy(attention.maps.flatten(-2)).flatten().numpy()
        if np.isfinite(values).all():
            tag = renamed(HISTOGRAM_TAG.format(role=role, layer=layer), name)
            _writer(logger).add_histogram(tag, values, snapshot.step)


def log_animation(logger: Any, *, tag: str, gif: bytes, step: int) -> None:
    """An animated GIF, where the dashboard can play one."""
    kind = kind_of(logger)
    if kind == "tensorboard":
        width, height = Image.open(io.BytesIO(gif)).size
        _add_encoded_image(logger, tag, gif, (height, width), step)
    elif kind in ("wandb", "mlflow"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{tag.replace('/', '_')}.gif"
            path.write_bytes(gif)
            if kind == "mlflow":
                logger.experiment.log_artifact(logger.run_id, str(path))
            else:
                import wandb

                _log_row(logger, {tag: wandb.Video(str(path), format="gif")}, step)


def log_summary(
    logger: Any,
    *,
    snapshot: AttentionSnapshot,
    thumbnails: Mapping[tuple[str, int, int, int], drawing.Pixels],
    entropies: Mapping[tuple[str, int], Mapping[int, Sequence[float]]],
    threshold: float,
    name: str = "",
) -> None:
    """At the end of a run, on W&B: a table of the last snapshot, and one chart of all heads for each layer.

    ``thumbnails`` are by (role, layer, image, head); ``entropies`` are by (role, layer), for each step one per head;
    ``threshold`` is that of the mask area.
    """
    if kind_of(logger) != "wandb":
        return
    import wandb

    table = wandb.Table(columns=["image", "role", "layer", "head", "entropy", "mask area", "attention"])
    for (role, layer, image, head), thumbnail in thumbnails.items():
        p = snapshot.maps(role, layer)[image, head].flatten()
        figures = [float(F.entropy(p)), float(F.mask_area(p, threshold))]
        table.add_data(snapshot.names[image], role, layer, head, *figures, wandb.Image(thumbnail, file_type="jpg"))
    media: dict[str, Any] = {renamed("attn_table", name): table}
    for (role, layer), by_step in entropies.items():
        heads = [list(series) for series in zip(*by_step.values(), strict=True)]
        media[renamed(f"attn_heads_chart/{role}/layer{layer}", name)] = wandb.plot.line_series(
            xs=list(by_step),
            ys=heads,
            keys=[f"head {h}" for h in range(len(heads))],
            title=titled(f"entropy per head, {role}, layer {layer}", name),
            xname="step",
        )
    _log_row(logger, media, snapshot.step)


def describe_run(logger: Any, *, text: str, snapshot: AttentionSnapshot, name: str = "") -> None:
    """Once for each run, on TensorBoard: how to read the maps, and for each metric charts of all heads of a layer."""
    if kind_of(logger) != "tensorboard":
        return
    writer = _writer(logger)
    writer.add_text(renamed("attn_monitor/how_to_read", name), text, 0)
    charts: dict[str, dict[str, Any]] = {}
    for (role, layer), metric in itertools.product(snapshot.layers, METRICS):
        tag = metric_tag(role, layer, metric, 0)
        if tag in snapshot.metrics or metric == "drift":  # there is no drift yet at the first snapshot
            lines = ["Multiline", [f"{renamed(tag, name)[:-1]}.*"]]
            charts.setdefault(titled(f"{metric.replace('_', ' ')} per head", name), {})[f"{role}, layer {layer}"] = (
                lines
            )
    with _charts_lock:
        together = _charts.setdefault(writer, {})
        together.update(charts)
        writer.add_custom_scalars(together)


def _writer(logger: Any) -> Any:
    """The TensorBoard writer of a logger, or the logger itself when it is one."""
    return logger if hasattr(logger, "add_custom_scalars") else logger.experiment


def _add_encoded_image(logger: Any, tag: str, encoded: bytes, size: tuple[int, int], step: int) -> None:
    # add_image would encode as PNG, several times the bytes; TensorBoard serves whatever is stored.
    image = {"height": size[0], "width": size[1], "colorspace": 3, "encoded_image_string": encoded}
    _add_summary(logger, [{"tag": tag, "image": image}], step)


def _add_summary(logger: Any, values: Sequence[Mapping[str, Any]], step: int) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    _writer(logger)._get_file_writer().add_summary(Summary(value=values), step)


def _log_row(logger: Any, row: Mapping[str, Any], step: int) -> None:
    # Without W&B's own step argument: its steps must not go back, and the background thread logs later than training.
    _run(logger).log({**row, WANDB_AXIS: step})


def _prefix(logger: Any) -> str:
    """What a Lightning logger puts before the names of metrics."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""


def _run(logger: Any) -> Any:
    """The W&B run of a logger, or the logger itself when it is one."""
    return logger.experiment if hasattr(logger, "experiment") else logger


def how_to_read(threshold: float, scale: str, settings: str = "", name: str = "") -> str:
    """Markdown for the dashboard: what the pictures show, with this run's settings."""
    colours = (
        "Colours are fixed: attention in units of **uniform** attention (weight × number of patches), on a log scale "
        "from half of uniform to 32 times uniform. A flat purple map says that attention is uniform."
        if scale == "uniform"
        else "Colours stretch each map from its own minimum to its own maximum, so strengths cannot be compared."
    )
    strips, panels = renamed("attn_filmstrip", name), renamed("attn_maps", name)
    return (
        f"### {titled('How to read the attention maps', name)}\n\n{colours} Outlined in cyan: the smallest set of "
        f"patches that holds {threshold:.0%} of the attention on patches. **H** is the entropy over patches (1 "
        "uniform, 0 one patch); the percentage is the outlined area; with H 1.00 there is none. "
        "Ground truth, where there is some, is green. "
        f"`{strips}` shows the steps so far in one picture; start TensorBoard with `--samples_per_plugin images=1000` "
        f"to see more than ten steps of `{panels}`. Charts of all heads of a layer are under *Custom Scalars*; "
        f"`{renamed('attn/health_flags', name)}` counts health flags.\n\n{settings}"
    )
