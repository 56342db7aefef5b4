"""Write animations to files: MP4 by PyAV, picture by picture; WebP and GIF by Pillow, all pictures at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from attn_monitor.draw.canvas import Pixels
from attn_monitor.extras import needs
from attn_monitor.record.atomic_file import atomic_file

Seconds = float | Fraction

MOST_BYTES = 4 * 2**30
"""Largest size in memory of all pictures of a WebP or GIF."""


class Animation(Protocol):
    """An encoder of pictures, uint8 (height, width, 3) and all of one size."""

    def add(self, picture: Pixels, seconds: Seconds) -> None:
        """Append a picture with its duration."""

    def close(self) -> None:
        """Write the pending pictures; the file itself stays open."""


class _PillowAnimation:
    """Keep all pictures until `close`, as Pillow needs them; ValueError if they exceed `MOST_BYTES`."""

    TICKS, SHORTEST = 1000, 0  # ticks a second, and the shortest duration of a picture in ticks
    OPTIONS: Mapping[str, Any] = {}

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._clock = file, _Clock(self.TICKS)
        self._pictures: list[Image.Image] = []
        self._durations: list[int] = []  # in ticks
        self._bytes = 0

    def add(self, picture: Pixels, seconds: Seconds) -> None:
        """Append a picture with its duration; drop it if the previous one has not been shown for `SHORTEST` yet."""
        duration = self._clock.add(seconds)
        if self._durations and self._durations[-1] < self.SHORTEST:
            self._durations[-1] += duration
            return
        self._bytes += picture.nbytes
        if self._bytes > MOST_BYTES:
            raise ValueError(
                f"the pictures of this WebP or GIF take more than {MOST_BYTES >> 30} GB of memory. Write an .mp4 "
                "instead, which is encoded picture by picture"
            )
        self._pictures.append(self._prepared(Image.fromarray(picture)))
        self._durations.append(duration)

    def close(self) -> None:
        """Write the file, which plays in an endless loop."""
        milliseconds = [max(duration, self.SHORTEST) * 1000 // self.TICKS for duration in self._durations]
        first, *others = self._pictures
        first.save(self._file, save_all=True, append_images=others, duration=milliseconds, loop=0, **self.OPTIONS)

    def _prepared(self, picture: Image.Image) -> Image.Image:
        return picture


class WebPAnimation(_PillowAnimation):
    """Encode lossy WebP with durations in whole milliseconds; a nearly equal picture prolongs the previous one."""

    OPTIONS: Mapping[str, Any] = {"format": "WEBP", "quality": 60, "method": 2, "kmax": -1}  # -1: no further key frames


class GifAnimation(_PillowAnimation):
    """Encode GIF with 128 colours per picture and, as viewers play no more, at most 50 pictures a second."""

    TICKS, SHORTEST = 100, 2
    OPTIONS: Mapping[str, Any] = {"format": "GIF"}

    def _prepared(self, picture: Image.Image) -> Image.Image:
        return picture.quantize(128)


class Mp4Animation:
    """Encode H.264 that every browser plays. An odd number of rows or columns is made even by repeating the last."""

    CLOCK = 90_000  # ticks a second

    def __init__(self, file: IO[bytes], crf: int = 20) -> None:
        self._av = import_av()
        self._file, self._crf, self._clock = file, crf, _Clock(self.CLOCK)
        self._container: Any = None
        self._stream: Any = None
        self._start = 0
        self._durations: dict[int, int] = {}  # of pictures in the encoder by start, as it does not keep them

    def add(self, picture: Pixels, seconds: Seconds) -> None:
        """Append a picture with its duration."""
        height, width = picture.shape[:2]
        if self._container is None:
            self._open(height + height % 2, width + width % 2, seconds)
        even = np.pad(picture, [(0, height % 2), (0, width % 2), (0, 0)], "edge")
        frame = self._av.VideoFrame.from_ndarray(even, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.pts, frame.time_base = self._start, Fraction(1, self.CLOCK)
        self._durations[self._start] = self._clock.add(seconds)
        self._start += self._durations[self._start]
        self._encode(frame)

    def close(self) -> None:
        """Flush the encoder and write the index."""
        if self._container is not None:
            self._encode(None)
            self._container.close()

    def _encode(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            packet.duration = self._durations.pop(packet.pts)
            self._container.mux(packet)

    def _open(self, height: int, width: int, seconds: Seconds) -> None:
        self._container = self._av.open(self._file, "w", format="mp4")
        rate = (1 / Fraction(seconds)).limit_denominator(1001)
        # No B-frames: the index stores durations between frames in the order of encoding.
        options = {"crf": str(self._crf), "preset": "veryfast", "bf": "0"}
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        context = self._stream.codec_context
        context.time_base = Fraction(1, self.CLOCK)
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709, as `add` converts


FORMATS: dict[str, Callable[[IO[bytes]], Animation]] = {
    ".webp": WebPAnimation,
    ".mp4": Mp4Animation,
    ".gif": GifAnimation,
}
"""Encoders by the suffix of the file name."""


def check_ending(path: Path) -> Path:
    """Return the path; ValueError if animations with its suffix cannot be written."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"out={path}: expected a name that ends in {', '.join(FORMATS)}")
    if path.suffix.lower() == ".mp4":
        import_av()
    return path


@contextmanager
def animation_file(path: Path) -> Iterator[Animation]:
    """Open a new animation in the format of the path's suffix; the file appears when it is complete, or never."""
    make = FORMATS[check_ending(path).suffix.lower()]
    with atomic_file(path) as file:
        animation = make(file)
        yield animation
        animation.close()


def import_av() -> Any:
    """Import PyAV, which only videos need; `MissingPackageError` if it is not installed."""
    with needs("av", "a video"):
        return importlib.import_module("av")


class _Clock:
    """Round durations to whole ticks with an error of at most half a tick in their sum."""

    def __init__(self, ticks: int) -> None:
        self._ticks, self._exact, self._shown = ticks, Fraction(0), 0

    def add(self, seconds: Seconds) -> int:
        self._exact += Fraction(seconds) * self._ticks
        duration = round(self._exact) - self._shown
        self._shown += duration
        return duration
