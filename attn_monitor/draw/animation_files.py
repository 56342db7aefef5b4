"""Animations as files: MP4 by PyAV, picture by picture; WebP and GIF by Pillow, once all pictures are there."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from attn_monitor.draw.canvas import Pixels

Seconds = float | Fraction

MOST_BYTES = 4 * 2**30
"""Of pictures that a WebP or GIF may hold in memory."""


class Animation(Protocol):
    """A file that takes pictures, uint8 (height, width, 3) and all of one size."""

    def add(self, picture: Pixels, seconds: Seconds) -> None:
        """Append a picture that is shown for so long."""

    def close(self) -> None:
        """Write what is left; the file itself stays open."""


class _PillowAnimation:
    """Holds all pictures until it is closed, as Pillow does; ValueError where they are more than `MOST_BYTES`."""

    TICKS, SHORTEST = 1000, 0  # ticks a second, and for how many a picture is shown at least
    OPTIONS: Mapping[str, Any] = {}

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._clock = file, _Clock(self.TICKS)
        self._pictures: list[Image.Image] = []
        self._durations: list[int] = []  # in ticks
        self._bytes = 0

    def add(self, picture: Pixels, seconds: Seconds) -> None:
        """Append a picture that is shown for so long; left out where the one before is not yet shown long enough."""
        duration = self._clock.add(seconds)
        if self._durations and self._durations[-1] < self.SHORTEST:
            self._durations[-1] += duration
            return
        self._bytes += picture.nbytes
        if self._bytes > MOST_BYTES:
            raise ValueError(
                f"a WebP or GIF is held in memory until its end, and this one has more than {MOST_BYTES >> 30} GB of "
                "pictures; write an .mp4, which needs no more memory the longer it is"
            )
        self._pictures.append(self._prepared(Image.fromarray(picture)))
        self._durations.append(duration)

    def close(self) -> None:
        """Write the file, which is played again and again."""
        milliseconds = [max(duration, self.SHORTEST) * 1000 // self.TICKS for duration in self._durations]
        first, *others = self._pictures
        first.save(self._file, save_all=True, append_images=others, duration=milliseconds, loop=0, **self.OPTIONS)

    def _prepared(self, picture: Image.Image) -> Image.Image:
        return picture


class WebPAnimation(_PillowAnimation):
    """Lossy, with durations in whole milliseconds; a picture that hardly differs prolongs the one before.

    ``kmax`` -1: no picture is stored whole again.
    """

    OPTIONS: Mapping[str, Any] = {
        "format": "WEBP",
        "quality": 60,
        "method": 2,
        "kmax": -1,
    }


class GifAnimation(_PillowAnimation):
    """Each picture has 128 colours of its own. At most 50 a second, which is what viewers play: others are left out."""

    TICKS, SHORTEST = 100, 2
    OPTIONS: Mapping[str, Any] = {"format": "GIF"}

    def _prepared(self, picture: Image.Image) -> Image.Image:
        return picture.quantize(128)


class Mp4Animation:
    """H.264 as every browser plays it, encoded by PyAV. An odd row or column at the end is repeated to make it even."""

    CLOCK = 90_000  # ticks a second

    def __init__(self, file: IO[bytes], crf: int = 20) -> None:
        self._av = import_av()
        self._file, self._crf, self._clock = file, crf, _Clock(self.CLOCK)
        self._container: Any = None
        self._stream: Any = None
        self._start = 0
        self._durations: dict[int, int] = {}  # by start, of what is being encoded: the encoder does not keep them

    def add(self, picture: Pixels, seconds: Seconds) -> None:
        """Append a picture that is shown for so long."""
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
        """Write the pictures that the encoder still has, and the index."""
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
        # Without B-frames, as the file's index knows durations only from one frame to the next of those encoded.
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
"""By the ending of a file's name."""


def check_ending(path: Path) -> Path:
    """Return the path; ValueError where animations of its ending cannot be written."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"out={path}: expected a name that ends in {', '.join(FORMATS)}")
    if path.suffix.lower() == ".mp4":
        import_av()
    return path


@contextmanager
def animation_file(path: Path) -> Iterator[Animation]:
    """Open a new animation in the format of the path's ending; it is complete under this name, or absent."""
    make = FORMATS[check_ending(path).suffix.lower()]
    temporary = path.with_name(f".writing-{secrets.token_hex(8)}{path.suffix}")
    try:
        with temporary.open("xb") as file:
            animation = make(file)
            yield animation
            animation.close()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def import_av() -> Any:
    """Import PyAV, which only videos need; ValueError where it is not installed."""
    try:
        return importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise ValueError("videos are read and written by PyAV. Run: pip install attn_monitor[video]") from error


class _Clock:
    """Rounds durations to whole ticks so that their sum is never more than half a tick off."""

    def __init__(self, ticks: int) -> None:
        self._ticks, self._exact, self._shown = ticks, Fraction(0), 0

    def add(self, seconds: Seconds) -> int:
        self._exact += Fraction(seconds) * self._ticks
        duration = round(self._exact) - self._shown
        self._shown += duration
        return duration
