"""Where snapshots go: TensorBoard, Weights & Biases, other loggers, and the background thread that writes.

This is the only place that knows what each logger can take, how pictures are encoded and in which channel order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attn_monitor import drawing

QUEUE_SIZE = 4
PATIENCE = 60.0  # seconds that training waits for a slow sink before pictures are skipped


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


class BackgroundWriter:
    """Runs jobs one after another on a thread of its own, so that training does not wait for drawing and writing.

    The queue is bounded: when a sink is slow, `submit` waits up to ``PATIENCE`` seconds and then refuses the job.
    What a job raises is kept in ``errors`` for the training thread to report.
    """

    def __init__(self, size: int = QUEUE_SIZE) -> None:
        self.errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.seconds = 0.0
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> bool:
        """Queue a job; False when there was no room for too long."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="attn_monitor-writer", daemon=True)
            self._thread.start()
        try:
            self._jobs.put(job, timeout=PATIENCE)
        except queue.Full:
            return False
        return True

    def drain(self) -> None:
        """Return when everything submitted has been written or has failed."""
        self._jobs.join()

    def close(self) -> None:
        """Write what is left and end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if job is None:
                    return
                started = time.perf_counter()
                job()
                self.seconds += time.perf_counter() - started
            except BaseException as error:
                self.errors.put(error)
            finally:
                self._jobs.task_done()
