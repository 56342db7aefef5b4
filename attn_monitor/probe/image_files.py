"""Read one image file as numbers: photographs, images of any number of bands, and volumes.

Pillow reads photographs. Bands and volumes are read by NumPy (`.npy`), tifffile, nibabel and pydicom, of the extra
"formats", which are imported when such a file is read.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from attn_monitor.errors import ProbeError
from attn_monitor.probe.dicom_files import is_dicom, read_dicom
from attn_monitor.probe.file_numbers import ARRAYS, SUFFIXES, FileNumbers, Numbers, numbers_of, too_large

MOST_BANDS = 512  # along an axis that is taken for bands where the model does not say how many it takes

_limit = threading.Lock()  # Pillow's limit is a number of its module


def is_image(file: Path) -> bool:
    """Return whether a file is an image that can be read, by its name, or of DICOM by its first bytes."""
    suffix = file.suffix.lower()
    known = suffix in SUFFIXES and (suffix != ".gz" or file.name.lower().endswith(".nii.gz"))
    return known or is_dicom(file)


def stem_of(file: Path) -> str:
    """Return the name without suffix, and without both of .nii.gz; numbers of DICOM files are none."""
    if file.name.lower().endswith(".nii.gz"):
        return file.name[:-7]
    return file.stem if file.suffix.lower() in SUFFIXES else file.name


def read_image(files: Sequence[Path], *, channels: int | None, volume: bool, large: bool) -> ReadImage:
    """Read one file, or the slices of one DICOM series.

    Args:
        files: One file, or the files of a series.
        channels: How many channels the model takes; None takes three of photographs, and those of other files.
        volume: Whether to read all slices of a stack, and not the one in its middle.
        large: Whether to read images with more pixels than Pillow's limit.

    Raises:
        ProbeError: The file has other channels, or a package is missing. Pillow raises nearly anything.
    """
    if not _holds_numbers(files[0], channels, volume):
        if volume:
            raise ProbeError("it is a picture of two axes, expected a volume")
        return _photograph(files[0], channels, large)
    read = read_dicom(files) if is_dicom(files[0]) else numbers_of(files[0], large)
    if read.values.dtype.kind not in "biuf":
        raise ProbeError(
            f"it holds {read.values.dtype} values, expected real numbers, such as magnitudes of complex ones"
        )
    found, part = _channels_first(read, channels, volume)
    _check_finite(found)
    if channels == 3 and len(found) == 1 and not volume:  # shown in grey, as a photograph would be
        grey = _as_bytes(found[0])
        return ReadImage((ImageOps.invert(grey) if read.white_is_low else grey).convert("RGB"), part=part)
    if channels not in (None, len(found)) or len(found) > MOST_BANDS:
        wanted = "channels" if channels is None else f"{channels} channels, as the model takes them"
        axes = "(channels, depth, height, width)" if volume else "(channels, height, width)"
        slices = ", slices of one channel" if "z" in read.axes and "c" not in read.axes else ""
        raise ProbeError(
            f"it holds numbers of shape {read.values.shape}{slices}, expected {axes} with {wanted}{read.way}"
        )
    numbers = torch.from_numpy(np.ascontiguousarray(found.astype(np.float32)))
    byte = found.dtype == np.uint8
    return ReadImage(numbers / 255 if byte else numbers, to_1=byte, part=part)


@dataclass(frozen=True)
class ReadImage:
    """What was read.

    Attributes:
        pixels: A picture of 8 bits, RGB or grey; or float32 of (channels, H, W) or (channels, D, H, W).
        to_1: Whether values are from 0 to 1 by the file's format; others are as they are in the file.
        part: Which part of the file it is, such as "slice12".
    """

    pixels: Image.Image | Tensor
    to_1: bool = True
    part: str = ""


def _holds_numbers(file: Path, channels: int | None, volume: bool) -> bool:
    """Return whether a file holds bands, a volume or measured values, and is no photograph for Pillow."""
    if file.suffix.lower() not in (".tif", ".tiff"):
        return file.suffix.lower() in ARRAYS or is_dicom(file)
    try:
        with _pixels(large=True), Image.open(file) as opened:  # the header alone
            measured = opened.mode.startswith(("I", "F")) and channels not in (None, 3)
            cut = channels != len(opened.getbands()) or max(opened.tag_v2.get(258, (1,))) > 8  # bits; Pillow takes 8
            more = channels not in (None, 1, 3) and cut
            return volume or measured or more or getattr(opened, "n_frames", 1) > 1
    except (OSError, SyntaxError):  # of many bands, or a type that Pillow does not know
        return True


def _photograph(file: Path, channels: int | None, large: bool) -> ReadImage:
    """Read the first frame upright: as RGB for three channels, as grey for one, with all its bands for others."""
    with _pixels(large), Image.open(file) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened)
        bands = len(image.getbands())
        if channels == 1 and image.mode.startswith("I;16"):
            return ReadImage(torch.from_numpy(np.asarray(image).astype(np.float32))[None] / 65535)
        if channels not in (None, 1, 3):
            if channels != bands:
                raise ProbeError(f"it holds {bands} channels ({image.mode}), expected {channels}, as the model takes")
            return ReadImage(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, dtype=np.float64)
            _check_finite(values)
            image = _as_bytes(values)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return ReadImage(image.convert("L" if channels == 1 else "RGB"))


def _check_finite(values: Numbers) -> None:
    lost = 1 - np.isfinite(values).mean() if values.dtype.kind == "f" else 0
    if lost:
        raise ProbeError(
            f"{lost:.1%} of its values are NaN or infinite, expected finite ones. Fill them, such as by "
            "numpy.nan_to_num(values, nan=0, posinf=0, neginf=0)"
        )


def open_rgb(file: Path) -> Image.Image:
    """Read the first frame as upright 8-bit RGB, with transparency over white."""
    image = _photograph(file, 3, large=False).pixels
    assert isinstance(image, Image.Image)
    return image


def _as_bytes(values: np.ndarray[Any, Any]) -> Image.Image:
    """Stretch (H, W) numbers to 8 bits, from 0 or the smallest below it to the largest; bytes stay."""
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    low = min(float(values.min()), 0.0)
    return Image.fromarray(((values - low) / max(float(values.max()) - low, 1) * 255).astype(np.uint8))


@contextmanager
def _pixels(large: bool) -> Iterator[None]:
    """Refuse images of more pixels than Pillow's limit, unless they are allowed; Pillow logs nothing."""
    log = logging.getLogger("PIL.TiffImagePlugin")
    with _limit, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        most, was_disabled = Image.MAX_IMAGE_PIXELS, log.disabled
        try:
            Image.MAX_IMAGE_PIXELS, log.disabled = None if large else most, True
            yield
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise too_large(str(error)) from error
        finally:
            Image.MAX_IMAGE_PIXELS, log.disabled = most, was_disabled


def _channels_first(read: FileNumbers, channels: int | None, volume: bool) -> tuple[Numbers, str]:
    """Return (channels, H, W), or (channels, D, H, W) of a volume, and which part of the file it is."""
    values, part = read.values, ""
    values, axes = _without_ones(
        values.astype(np.uint8) * 255 if values.dtype == bool else values, read.axes, 3 + volume
    )
    axes = _named(values.shape, axes, channels, volume)
    if "z" in axes and not volume:
        where = axes.index("z")
        count = values.shape[where]
        if "c" not in axes and channels == count and channels not in (1, 3):
            axes = axes.replace("z", "c")
        else:
            values, axes = values.take(count // 2, where), axes.replace("z", "", 1)
            part = f"slice{count // 2}" if count > 1 else ""
    order = [axes.find(axis) for axis in ("czyx" if volume else "cyx") if axis in axes or axis != "c"]
    if sorted(order) != list(range(values.ndim)):
        expected = "three axes, or four with channels" if volume else "two axes, or three with channels"
        way = read.way or ("" if volume or values.ndim != 4 else _as_a_clip(values.shape, channels))
        raise ProbeError(f"it holds numbers of shape {read.values.shape}, expected {expected}{way}")
    values = values.transpose(order)
    return (values if "c" in axes else values[None]), part


def _as_a_clip(shape: tuple[int, ...], channels: int | None) -> str:
    """Return how to read numbers of four axes, such as a clip."""
    where = _channel_axis(shape, channels)
    size = ", ".join(str(n) for axis, n in enumerate(shape) if axis != where)
    return f'. Clips and volumes are read with a size of three numbers: image_size=({size}), or --size "[{size}]"'


def _without_ones(values: Numbers, axes: str, most: int) -> tuple[Numbers, str]:
    """Drop axes of one entry while there are more than ``most``."""
    while len(axes) > most and (
        ones := [n for n, axis in enumerate(axes) if axis not in "yx" and values.shape[n] == 1]
    ):
        values, axes = values.squeeze(ones[0]), axes[: ones[0]] + axes[ones[0] + 1 :]
    return values, axes


def _named(shape: tuple[int, ...], axes: str, channels: int | None, volume: bool) -> str:
    """Return the axes, named by the sizes where the file does not say."""
    space = "zyx" if volume else "yx"
    if "?" not in axes or not 0 <= len(shape) - len(space) <= 1:
        return axes
    if len(shape) == len(space):
        return space
    if channels == 1 and not volume and 1 < shape[0] < shape[2] and shape[0] != shape[1]:
        return "zyx"
    where = _channel_axis(shape, channels)
    return space[:where] + "c" + space[where:]


def _channel_axis(shape: tuple[int, ...], channels: int | None) -> int:
    """Return which axis holds the channels: the first or the last, or of clips (frames, channels, H, W) the second."""
    first, last, few = shape[0], shape[-1], (1, 3) if channels is None and len(shape) == 4 else (channels,)
    if (first in few) != (last in few):
        return 0 if first in few else len(shape) - 1
    if len(shape) == 4 and shape[1] in few and first not in few:
        return 1
    return len(shape) - 1 if last < first or (len(shape) == 3 and first == shape[1] != last) else 0
