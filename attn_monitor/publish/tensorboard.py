"""TensorBoard: Lightning's logger or a plain `SummaryWriter`. Pictures are stored as JPEG, charts are laid out."""

from __future__ import annotations

import io
import itertools
import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image

from attn_monitor import functional as F
from attn_monitor.measure.metrics import METRICS
from attn_monitor.measurements import HealthFlag, MetricKey
from attn_monitor.publish.attention_sinks import AttentionSinkRow, markdown
from attn_monitor.publish.sink import Picture, Sink, is_a, is_lightning, prefix_of
from attn_monitor.publish.tags import renamed, titled
from attn_monitor.snapshot import Snapshot
from attn_monitor.workers import safe_point

# Of each writer. Only the last layout in a run is shown, so it has to hold the charts of all callbacks.
_charts: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
_charts_lock = threading.Lock()

# Of each queue of a writer. Held while something of ours is in it.
_ours: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()


class TensorBoardSink(Sink):
    """Event files."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """TensorBoardLogger, and the SummaryWriters of torch and tensorboardX."""
        writer = is_a(logger, "torch", "SummaryWriter") or is_a(logger, "tensorboardX", "SummaryWriter")
        return writer or is_lightning(logger, "TensorBoardLogger")

    @property
    def writer(self) -> Any:
        """The logger's SummaryWriter, or the logger itself when it is one."""
        return self.logger if hasattr(self.logger, "add_custom_scalars") else self.logger.experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """All in one record, which is ten times as fast as add_scalar for each."""
        prefix = prefix_of(self.logger)
        self._add_summary([{"tag": f"{prefix}{tag}", "simple_value": value} for tag, value in metrics.items()], step)

    def log_pictures(self, pictures: Sequence[Picture], step: int) -> None:
        """As image summaries."""
        for picture in pictures:
            height, width = picture.pixels.shape[:2]
            self._add_encoded_image(picture.tag, picture.jpeg, (height, width), step)

    def stored_bytes(self, pictures: Sequence[Picture]) -> int:
        """Twice, as those before may wait in its buffer."""
        return 2 * sum(len(picture.jpeg) for picture in pictures)

    def log_flags(self, flags: Sequence[HealthFlag], step: int) -> None:
        """As text."""
        text = "\n".join(f"- {flag}" for flag in flags)
        self.writer.add_text(renamed("attn_monitor/health", self.name), text, step)

    def log_histograms(self, snapshot: Snapshot) -> None:
        """Entropy over heads and images, where no row holds NaN."""
        for (role, layer), attention in snapshot.layers.items():
            safe_point()
            values = F.entropy(attention.maps.flatten(-2)).flatten().numpy()
            if np.isfinite(values).all():
                tag = renamed(f"attn_histogram/{role}/layer{layer}/entropy", self.name)
                self.writer.add_histogram(tag, values, snapshot.step)

    def log_animation(self, tag: str, gif: bytes, step: int) -> None:
        """As an image summary, which plays."""
        width, height = Image.open(io.BytesIO(gif)).size
        self._add_encoded_image(tag, gif, (height, width), step)

    def log_attention_sinks(self, rows: Sequence[AttentionSinkRow], step: int) -> None:
        """As text."""
        self.writer.add_text(renamed("attn_monitor/sinks", self.name), markdown(rows), step)

    def describe_run(self, text: str, snapshot: Snapshot) -> None:
        """How to read the maps, and for each metric a chart of all heads of each layer."""
        self.writer.add_text(renamed("attn_monitor/how_to_read", self.name), text, 0)
        charts: dict[str, dict[str, Any]] = {}
        for (role, layer), metric in itertools.product(snapshot.layers, METRICS):
            # There is no drift yet at the first snapshot.
            if MetricKey(role, layer, metric, 0) in snapshot.metrics or metric == "drift":
                lines = renamed(f"attn_heads/{role}/layer{layer}/{metric}/head.*", self.name)
                chart = charts.setdefault(titled(f"{metric.replace('_', ' ')} per head", self.name), {})
                chart[f"{role}, layer {layer}"] = ["Multiline", [lines]]
        with _charts_lock:
            together = _charts.setdefault(self.writer, {})
            together.update(charts)
            self.writer.add_custom_scalars(together)

    def _add_encoded_image(self, tag: str, encoded: bytes, size: tuple[int, int], step: int) -> None:
        # add_image would encode as PNG, several times the bytes; TensorBoard serves whatever is stored.
        image = {"height": size[0], "width": size[1], "colorspace": 3, "encoded_image_string": encoded}
        self._add_summary([{"tag": tag, "image": image}], step)

    def _add_summary(self, values: Sequence[Mapping[str, Any]], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        writer = self.writer._get_file_writer()
        with _room_for_others(writer):
            writer.add_summary(Summary(value=values), step)


@contextmanager
def _room_for_others(writer: Any) -> Iterator[None]:
    """Let others put what they like into a writer's queue while ours is put there and written; returns when it is.

    The queue of torch's writer holds ten records, and that of a picture takes long to write. While the queue is full,
    whoever logs waits for room and holds the writer's lock. If that is the training thread and a signal comes, such as
    the one by which Slurm announces the end of a job, its handler flushes the writer and needs that lock: a deadlock.
    """
    waiting = getattr(getattr(writer.event_writer, "_async_writer", None), "_byte_queue", None)
    if not isinstance(waiting, queue.Queue):  # tensorboardX waits without a lock
        yield
        return
    with _ours.setdefault(waiting, threading.Lock()):
        room, waiting.maxsize = waiting.maxsize, sys.maxsize  # not 0: whoever waits would not be woken
        try:
            yield
            waiting.join()
        finally:
            waiting.maxsize = room
