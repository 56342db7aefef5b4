"""Frames of a video file or of a folder of images, read one after another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from attn_monitor.draw.animation_files import import_av
from attn_monitor.draw.canvas import Pixels
from attn_monitor.probe.file_numbers import PHOTOGRAPHS
from attn_monitor.probe.image_files import open_rgb


@dataclass(frozen=True)
class Frame:
    """A picture, uint8 (height, width, 3), and for how long it is shown."""

    pixels: Pixels
    seconds: Fraction


class Frames(Protocol):
    """Frames to go through once; ``count`` is the expected number, None where it is not known.

    ``missing`` says afterwards what could not be read; empty where all could.
    """

    count: int | None
    missing: str

    def __iter__(self) -> Iterator[Frame]: ...


def read_frames(path: Path, fps: float | None = None) -> Frames:
    """Open a video file, or a folder of images as one of ``fps`` frames a second (25 by default).

    Raises:
        FileNotFoundError: there is nothing at the path, or no image in the folder.
        ValueError: the file is no video, or ``fps`` is out of range or given for a file.
    """
    if path.is_dir():
        if fps is not None and not 0 < fps <= 1000:
            raise ValueError(f"fps={fps}: expected frames per second, above 0 and up to 1000")
        return ImageFrames(path, 25 if fps is None else fps)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: does not exist; expected a video file or a folder of frames")
    if fps is not None:
        raise ValueError(f"fps={fps} is for folders of frames; {path} is a file, which keeps its own times")
    return VideoFrames(path)


class ImageFrames:
    """Images of a folder in the natural order of their names: 2.png before 10.png."""

    def __init__(self, folder: Path, fps: float) -> None:
        self._seconds = 1 / Fraction(fps).limit_denominator(1001)
        images = [p for p in folder.iterdir() if p.suffix.lower() in PHOTOGRAPHS and p.is_file()]
        self._paths = sorted(images, key=_natural)
        if not self._paths:
            raise FileNotFoundError(f"{folder}: holds no images ({', '.join(sorted(PHOTOGRAPHS))})")
        self.count: int | None = len(self._paths)
        self.missing = ""

    def __iter__(self) -> Iterator[Frame]:
        broken = []
        for path in self._paths:
            try:
                pixels = np.asarray(open_rgb(path))
            except Exception as error:  # Pillow's plugins raise nearly anything on broken files
                broken.append(f"{path} ({type(error).__name__}: {error})")
            else:
                yield Frame(pixels, self._seconds)
        if broken:
            self.missing = f"cannot read {'; '.join(broken)}"


class VideoFrames:
    """Frames of a file's first video stream, upright, each with its own duration."""

    def __init__(self, path: Path) -> None:
        self._av, self._path = import_av(), path
        self.missing = ""
        with path.open("rb") as file, self._open(file) as container:
            stream = container.streams.video[0]
            self.count: int | None = stream.frames or None
            self._promised = _duration(stream, container)

    def __iter__(self) -> Iterator[Frame]:
        shown = Fraction(0)
        with self._path.open("rb") as file, self._open(file) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            usual = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
            for frame, seconds in _timed(self._decode(container), usual):
                yield Frame(_upright(frame), seconds)
                shown += seconds
        if not self.missing and self._promised is not None and shown < self._promised * Fraction(9, 10):
            self.missing = "it ends before its time"
        if self.missing:
            of = "" if self._promised is None else f" of {float(self._promised):.3g}"
            self.missing = f"{self._path}: {self.missing}; {float(shown):.3g}{of} seconds could be read"

    def _open(self, file: Any) -> Any:
        # Playlists that name other files or servers are videos to FFmpeg: it may read nothing but this file.
        try:
            container = self._av.open(file, "r", options={"protocol_whitelist": "none"})
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise ValueError(f"{self._path}: is no video that can be read ({_reason(error)})") from error
        if not container.streams.video:
            container.close()
            raise ValueError(f"{self._path}: has no video stream")
        return container

    def _decode(self, container: Any) -> Iterator[Any]:
        """Yield all frames up to the first damaged one."""
        try:
            for frame in container.decode(video=0):
                if frame.is_corrupt:
                    self.missing = "it is damaged"
                    return
                yield frame
        except (self._av.error.FFmpegError, OSError) as error:
            self.missing = f"it is damaged ({_reason(error)})"


def _duration(stream: Any, container: Any) -> Fraction | None:
    """Return the duration in the file's header, in seconds."""
    if stream.duration:
        return Fraction(stream.duration * stream.time_base)
    return Fraction(container.duration, 1_000_000) if container.duration else None


def _timed(frames: Iterator[Any], usual: Fraction) -> Iterator[tuple[Any, Fraction]]:
    """Yield each frame with the seconds until the next one; ``usual`` where times are not known, or go back."""
    before: Any = None
    for frame in frames:
        if before is not None:
            known = before.pts is not None and frame.pts is not None and frame.pts > before.pts
            yield before, Fraction((frame.pts - before.pts) * frame.time_base) if known else usual
        before = frame
    if before is not None:
        yield before, Fraction(before.duration * before.time_base) if before.duration else usual


def _upright(frame: Any) -> Pixels:
    """Turn a frame as players do: telephones store its rotation."""
    pixels: Pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers by value."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in parts if part]


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
