"""Log to TensorBoard, by Lightning's logger or a plain `SummaryWriter`, with pictures as WebP or JPEG."""

from __future__ import annotations

import io
import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from PIL import Image

from attn_monitor.trackers.events import Animation, Event, Histogram, Layout, Picture, Scalars, Text
from attn_monitor.trackers.tracker import Tracker, is_a, is_lightning, prefix_of

# By writer. TensorBoard shows only the last layout of a run, so it has to hold the charts of all callbacks.
_charts: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
_charts_lock = threading.Lock()

# By queue of a writer: the lock that is held while a record of this package is in it.
_ours: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()


class TensorBoard(Tracker):
    """Log to event files."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self.methods = {
            Scalars: self._scalars,
            Picture: self._picture,
            Histogram: self._histogram,
            Animation: self._animation,
            Text: lambda text, step: self.writer.add_text(text.tag, text.content, step),
            Layout: self._layout,
        }

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept TensorBoardLogger, and the SummaryWriters of torch and tensorboardX."""
        writer = is_a(logger, "torch", "SummaryWriter") or is_a(logger, "tensorboardX", "SummaryWriter")
        return writer or is_lightning(logger, "TensorBoardLogger")

    @property
    def writer(self) -> Any:
        """Return the logger's SummaryWriter, or the logger itself if it is one."""
        return self.logger if hasattr(self.logger, "add_custom_scalars") else self.logger.experiment

    def stored_bytes(self, event: Event[Any]) -> int:
        """Return twice a picture's size, as earlier ones may wait in the writer's buffer."""
        return 2 * len(event.encoded) if isinstance(event, Picture) else super().stored_bytes(event)

    def _scalars(self, scalars: Scalars, step: int) -> None:
        """Write all numbers in one record, ten times as fast as ``add_scalar`` for each."""
        prefix = prefix_of(self.logger)
        values = [{"tag": f"{prefix}{tag}", "simple_value": value} for tag, value in scalars.content.items()]
        self._add_summary(values, step)

    def _picture(self, picture: Picture, step: int) -> None:
        self._add_encoded_image(picture.tag, picture.encoded, picture.content.shape[:2], step)

    def _animation(self, animation: Animation, step: int) -> None:
        """Log the GIF as an image summary, which TensorBoard plays."""
        width, height = Image.open(io.BytesIO(animation.content)).size
        self._add_encoded_image(animation.tag, animation.content, (height, width), step)

    def _histogram(self, histogram: Histogram, step: int) -> None:
        if histogram.content.size:
            self.writer.add_histogram(histogram.tag, histogram.content, step)

    def _layout(self, layout: Layout, step: int) -> None:
        with _charts_lock:
            together = _charts.setdefault(self.writer, {})
            for (section, title), tag in layout.content.items():
                together.setdefault(section, {})[title] = ["Multiline", [tag]]
            self.writer.add_custom_scalars(together)

    def _add_encoded_image(self, tag: str, encoded: bytes, size: Sequence[int], step: int) -> None:
        # `add_image` would encode as PNG, several times the bytes; TensorBoard serves what is stored.
        image = {"height": size[0], "width": size[1], "colorspace": 3, "encoded_image_string": encoded}
        self._add_summary([{"tag": tag, "image": image}], step)

    def _add_summary(self, values: Sequence[Mapping[str, Any]], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        writer = self.writer._get_file_writer()
        with _room_for_others(writer):
            writer.add_summary(Summary(value=values), step)


@contextmanager
def _room_for_others(writer: Any) -> Iterator[None]:
    """Lift the limit of a writer's queue during a ``with`` block, and until the records in the queue are written.

    The queue of torch's writer holds ten records, and a picture takes long to write. While the queue is full, a thread
    that logs waits for room and holds the writer's lock. If that is the training thread and a signal arrives, such as
    Slurm's at the end of a job, its handler flushes the writer and needs that lock: a deadlock.
    """
    waiting = getattr(getattr(writer.event_writer, "_async_writer", None), "_byte_queue", None)
    if not isinstance(waiting, queue.Queue):  # tensorboardX waits without a lock
        yield
        return
    with _ours.setdefault(waiting, threading.Lock()):
        room, waiting.maxsize = waiting.maxsize, sys.maxsize  # not 0, which would not wake waiting threads
        try:
            yield
            waiting.join()
        finally:
            waiting.maxsize = room
