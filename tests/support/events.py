"""Read TensorBoard event files back, as TensorBoard itself does."""

from __future__ import annotations

import io
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image


class Events:
    """Scalars, images and texts of one log directory, by tag: lists of (step, value) in order of steps.

    Ordered here, as event files that one process starts within a second are read in the order of their names.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        everything = {"scalars": 0, "images": 0, "tensors": 0, "compressedHistograms": 0, "histograms": 0}
        self._read = EventAccumulator(str(folder), size_guidance=everything)
        self._read.Reload()
        self.tags: dict[str, list[str]] = self._read.Tags()

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        return sorted(((e.step, e.value) for e in self._read.Scalars(tag)), key=itemgetter(0))

    def encoded(self, tag: str) -> list[tuple[int, bytes]]:
        return sorted(((e.step, e.encoded_image_string) for e in self._read.Images(tag)), key=itemgetter(0))

    def images(self, tag: str) -> list[tuple[int, np.ndarray]]:
        return [(step, np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))) for step, data in self.encoded(tag)]

    def text(self, tag: str) -> str:
        tensor = self._read.Tensors(f"{tag}/text_summary")[0].tensor_proto
        return tensor.string_val[0].decode()

    def charts(self) -> dict[str, list[str]]:
        """Categories of the custom-scalars layout, with the tags of their charts."""
        from tensorboard.plugins.custom_scalar import layout_pb2

        (*_, last) = self._read.Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(last.tensor_proto.string_val[0])
        return {c.title: [tag for chart in c.chart for tag in chart.multiline.tag] for c in layout.category}
