"""Animations as files, WebP, GIF or MP4: written picture by picture, so that memory does not grow with their length.

Pillow writes an animation only once it has all of its pictures. So it encodes single pictures here, and what goes
around them is written by the formats' own descriptions: https://developers.google.com/speed/webp/docs/riff_container
and https://www.w3.org/Graphics/GIF/spec-gif89a.txt.
"""

from __future__ import annotations

import importlib
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import GifImagePlugin, Image, ImageChops

from attn_monitor.draw.canvas import Pixels

Seconds = float | Fraction


class Animation(Protocol):
    """A file that takes pictures, uint8 (height, width, 3) and all of one size."""

    def add(self, picture: Pixels, seconds: Seconds) -> None:
        """Append a picture that is shown for so long."""

    def close(self) -> None:
        """Write what is left; the file itself stays open."""


class WebPAnimation:
    """Each picture is a lossy WebP of its own, transparent in blocks of 16 × 16 pixels where the last ones still hold.

    ``quality`` is 0…100, ``effort`` 0 (fast) … 6 (small).
    """

    BLOCK, TOLERANCE = 16, 8  # pixels, and levels of 255 that a colour may be off

    def __init__(self, file: IO[bytes], quality: int = 60, effort: int = 2) -> None:
        self._file, self._quality, self._effort = file, quality, effort
        self._ends = _Ends(1000)
        self._shown: Image.Image | None = None

    def add(self, picture: Pixels, seconds: Seconds) -> None:
        """Append a picture that is shown for so long, in whole milliseconds."""
        size = _little(picture.shape[1] - 1, 3) + _little(picture.shape[0] - 1, 3)
        if self._shown is None:
            animated_with_alpha = b"\x12\0\0\0"
            self._file.write(b"RIFF\0\0\0\0WEBP" + _chunk(b"VP8X", animated_with_alpha + size))  # its length: `close`
            self._file.write(_chunk(b"ANIM", bytes(6)))  # for ever
        encoded = io.BytesIO()
        self._drawn(picture).save(encoded, "WEBP", quality=self._quality, method=self._effort)
        chunks = encoded.getvalue()[len(b"RIFF----WEBP") :]
        if chunks.startswith(b"VP8X"):  # says what the file's own says already
            chunks = chunks[len(b"VP8X----") + 10 :]
        where_when_over = bytes(6) + size + _little(self._ends.add(seconds), 3) + b"\0"
        self._file.write(_chunk(b"ANMF", where_when_over + chunks))

    def close(self) -> None:
        """Write the length of the file into its header."""
        length = self._file.tell()
        self._file.seek(4)
        self._file.write(_little(length - 8, 4))
        self._file.seek(length)

    def _drawn(self, picture: Pixels) -> Image.Image:
        """What of the picture is to be drawn over those before."""
        image = Image.fromarray(picture)
        if self._shown is None:
            self._shown = image.copy()
            return image
        rows, columns = (-(-length // self.BLOCK) for length in picture.shape[:2])
        whole = 0, 0, columns * self.BLOCK, rows * self.BLOCK
        apart = np.asarray(ImageChops.difference(image, self._shown).crop(whole))  # black where it goes beyond
        apart = apart.reshape(rows, self.BLOCK, -1).max(1).reshape(rows, columns, -1).max(2)
        blocks = Image.fromarray((apart > self.TOLERANCE) * np.uint8(255))
        changed = blocks.resize(whole[2:], Image.Resampling.NEAREST).crop((0, 0, *image.size))
        self._shown.paste(image, mask=changed)
        if not (apart > self.TOLERANCE).all():
            image.putalpha(changed)
        return image


class GifAnimation:
    """Each picture has 128 colours of its own. At most 50 a second, which is what viewers play: others are left out."""

    SHORTEST = 2  # hundredths of a second

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._ends = file, _Ends(100)
        self._waiting: tuple[Pixels, int] | None = None  # until it is known how long it is shown
        self._last: Pixels | None = None

    def add(self, picture: Pixels, seconds: Seconds) -> None:
        """Append a picture that is shown for so long, in hundredths of a second."""
        hundredths = self._ends.add(seconds)
        if self._waiting is None:
            height, width = picture.shape[:2]
            self._file.write(b"GIF89a" + _little(width, 2) + _little(height, 2) + b"\x70\0\0")
            self._file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")  # for ever
            self._waiting = picture, hundredths
        elif self._waiting[1] < self.SHORTEST:
            self._waiting = self._waiting[0], self._waiting[1] + hundredths
        else:
            self._write(*self._waiting)
            self._waiting = picture, hundredths

    def close(self) -> None:
        """Write the last picture."""
        if self._waiting is not None:
            self._write(*self._waiting)
        self._file.write(b";")

    def _write(self, picture: Pixels, hundredths: int) -> None:
        top, bottom, left, right = _changed(picture, self._last)
        self._last = picture
        part = Image.fromarray(np.ascontiguousarray(picture[top:bottom, left:right])).quantize(128)
        milliseconds = 10 * max(hundredths, self.SHORTEST)
        blocks = GifImagePlugin.getdata(part, (left, top), include_color_table=True, duration=milliseconds)
        self._file.writelines(blocks)


class Mp4Animation:
    """H.264 as every browser plays it, encoded by PyAV. An odd row or column at the end is repeated to make it even."""

    CLOCK = 90_000  # ticks a second

    def __init__(self, file: IO[bytes], crf: int = 20) -> None:
        self._av = import_av()
        self._file, self._crf, self._ends = file, crf, _Ends(self.CLOCK)
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
        self._durations[self._start] = self._ends.add(seconds)
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


FORMATS: dict[str, type[WebPAnimation | GifAnimation | Mp4Animation]] = {
    ".webp": WebPAnimation,
    ".mp4": Mp4Animation,
    ".gif": GifAnimation,
}
"""By the ending of a file's name."""


def check_ending(path: Path) -> Path:
    """The path, if animations of its ending can be written here."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"out={path}: expected a name that ends in {', '.join(FORMATS)}")
    if path.suffix.lower() == ".mp4":
        import_av()
    return path


@contextmanager
def animation_file(path: Path) -> Iterator[Animation]:
    """A new animation in the format of the path's ending: complete under this name, or not there at all."""
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
    """PyAV, which only videos need."""
    try:
        return importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise ValueError("videos are read and written by PyAV. Run: pip install attn_monitor[video]") from error


class _Ends:
    """Durations in whole ticks, whose sum is never more than half a tick off."""

    def __init__(self, ticks: int) -> None:
        self._ticks, self._exact, self._told = ticks, Fraction(0), 0

    def add(self, seconds: Seconds) -> int:
        self._exact += Fraction(seconds) * self._ticks
        duration = round(self._exact) - self._told
        self._told += duration
        return duration


def _little(number: int, size: int) -> bytes:
    return number.to_bytes(size, "little")


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + _little(len(content), 4) + content + bytes(len(content) % 2)


def _changed(picture: Pixels, before: Pixels | None) -> tuple[int, int, int, int]:
    """The rectangle of what differs: top, bottom, left, right; one pixel where nothing does."""
    if before is None:
        return 0, picture.shape[0], 0, picture.shape[1]
    differs = (picture != before).any(-1)
    if not differs.any():
        return 0, 1, 0, 1
    (rows,), (columns,) = differs.any(1).nonzero(), differs.any(0).nonzero()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
