"""What each logger can take: TensorBoard, Weights & Biases, and any other by `log_metrics`.

This is the only place that knows how pictures are encoded and in which channel order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attn_monitor import drawing


@dataclass(frozen=True)
class Picture:
    """A drawn picture with the tag it is logged under; encoded once, for all loggers."""

    tag: str
    pixels: drawing.Pixels
    caption: str

    @cached_property
    def jpeg(self) -> bytes:
        """The picture as JPEG."""
        return drawing.jpeg(self.pixels)


def _is_kind(logger: Any, name: str) -> bool:
    """By class name, so that loggers of `lightning.pytorch` and `pytorch_lightning` are both known, unimported."""
    return any(base.__name__ == name for base in type(logger).__mro__)


def _summary_writer(logger: Any) -> Any | None:
    """The TensorBoard writer of a logger, or the logger itself when it is one."""
    if _is_kind(logger, "TensorBoardLogger"):
        return logger.experiment
    return logger if _is_kind(logger, "SummaryWriter") else None


def log_scalars(logger: Any, *, metrics: Mapping[str, float], step: int) -> None:
    """Metrics by tag, to any Lightning logger or a plain TensorBoard `SummaryWriter`."""
    if hasattr(logger, "log_metrics"):
        logger.log_metrics(dict(metrics), step=step)
    else:
        for tag, value in metrics.items():
            logger.add_scalar(tag, value, step)


def takes_pictures(logger: Any) -> bool:
    """Whether `log_pictures` can do anything with this logger."""
    return _summary_writer(logger) is not None or _is_kind(logger, "WandbLogger")


def log_pictures(logger: Any, *, pictures: Sequence[Picture], step: int) -> None:
    """Pictures to a logger that takes them."""
    writer = _summary_writer(logger)
    if writer is not None:
        _to_event_file(writer, pictures, step)
    else:
        for picture in pictures:
            logger.log_image(picture.tag, [picture.pixels], step=step, caption=[picture.caption], file_type=["jpg"])


def _to_event_file(writer: Any, pictures: Sequence[Picture], step: int) -> None:
    # add_image would encode as PNG, several times the bytes; TensorBoard serves whatever is stored.
    from tensorboard.compat.proto.summary_pb2 import Summary

    for picture in pictures:
        height, width = picture.pixels.shape[:2]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture.jpeg)
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=picture.tag, image=image)]), step)


def describe_run(logger: Any, *, text: str, layers: Sequence[tuple[str, int]]) -> None:
    """Once for each run, on TensorBoard: how to read the maps, and a chart of all heads for each role and layer."""
    writer = _summary_writer(logger)
    if writer is None:
        return
    writer.add_text("attn_monitor/how_to_read", text, 0)
    charts = {
        f"{metric.replace('_', ' ')} per head": {
            f"{role}, layer {layer}": ["Multiline", [f"attn_heads/{role}/layer{layer}/{metric}/head.*"]]
            for role, layer in layers
        }
        for metric in ("entropy", "mask_area", "prefix_mass", "drift")
    }
    writer.add_custom_scalars(charts)


def how_to_read(threshold: float, scale: str) -> str:
    """Markdown for the dashboard: what the pictures show, with this run's settings."""
    colours = (
        "Colours are fixed: attention in units of **uniform** attention (weight × number of patches), on a log scale "
        "from half of uniform to 32 times uniform. A flat purple map says that attention is uniform."
        if scale == "uniform"
        else "Colours stretch each map from its own minimum to its own maximum, so strengths cannot be compared."
    )
    return (
        f"### How to read the attention maps\n\n{colours} Outlined in cyan: the smallest set of patches that holds "
        f"{threshold:.0%} of the attention on patches. **H** is the entropy over patches (1 uniform, 0 one patch); "
        "the percentage is the outlined area. `attn_filmstrip` shows the steps so far in one picture; start "
        "TensorBoard with `--samples_per_plugin images=1000` to see more than ten steps of `attn_maps`. Charts of all "
        "heads of a layer are under *Custom Scalars*."
    )
