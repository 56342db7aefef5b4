"""Read one image file as numbers: photographs, images of any number of bands, and volumes.

Pillow reads photographs. Bands and volumes are read by NumPy (`.npy`), tifffile, nibabel and pydicom, of the extra
"formats", which are imported when such a file is read.
"""

from __future__ import annotations

import importlib
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
from attn_monitor.extras import remedy

PHOTOGRAPHS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
ARRAYS = {".npy", ".nii", ".gz", ".dcm"}  # .gz is .nii.gz
MOST_BANDS = 512  # along an axis that is taken for bands where the model does not say how many it takes

_limit = threading.Lock()  # Pillow's limit is a number of its module


def is_image(file: Path) -> bool:
    """Return whether the name is one of an image that can be read."""
    suffix = file.suffix.lower()
    return suffix in PHOTOGRAPHS | ARRAYS and (suffix != ".gz" or file.name.lower().endswith(".nii.gz"))


def stem_of(file: Path) -> str:
    """Return the name without suffix, and without both of .nii.gz."""
    return file.name[:-7] if file.name.lower().endswith(".nii.gz") else file.stem


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
    read = _dicom(files) if files[0].suffix.lower() == ".dcm" else _array(files[0], large)
    if read.values.dtype.kind not in "biuf":
        raise ProbeError(
            f"it holds {read.values.dtype} values, expected real numbers, such as magnitudes of complex ones"
        )
    found, part = _channels_first(read, channels, volume)
    if channels == 3 and len(found) == 1 and not volume:  # shown in grey, as a photograph would be
        return ReadImage(_as_bytes(found[0]).convert("RGB"), part=part)
    if channels not in (None, len(found)) or len(found) > MOST_BANDS:
        wanted = "channels" if channels is None else f"{channels} channels, as the model takes them"
        axes = "(channels, depth, height, width)" if volume else "(channels, height, width)"
        raise ProbeError(f"it holds numbers of shape {read.values.shape}, expected {axes} with {wanted}{read.way}")
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
        return file.suffix.lower() in ARRAYS
    try:
        with _pixels(large=True), Image.open(file) as opened:  # the header alone
            measured = opened.mode.startswith(("I", "F")) and channels not in (None, 3)
            return volume or measured or getattr(opened, "n_frames", 1) > 1
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
            image = _as_bytes(np.asarray(image, dtype=np.float64))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return ReadImage(image.convert("L" if channels == 1 else "RGB"))


def open_rgb(file: Path) -> Image.Image:
    """Read the first frame as upright 8-bit RGB, with transparency over white."""
    image = _photograph(file, 3, large=False).pixels
    assert isinstance(image, Image.Image)
    return image


def _as_bytes(values: np.ndarray[Any, Any]) -> Image.Image:
    """Stretch (H, W) numbers to 8 bits, from 0 or the smallest below it to the largest."""
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
            raise _too_large(str(error)) from error
        finally:
            Image.MAX_IMAGE_PIXELS, log.disabled = most, was_disabled


def _too_large(reason: str) -> ProbeError:
    return ProbeError(
        f"{reason.partition(',')[0]}, as a decompression bomb has. If you trust it, pass large_images=True, "
        "or --large_images true to a command"
    )


@dataclass(frozen=True)
class _Numbers:
    values: np.ndarray[Any, Any]
    sliced: bool = False  # the first axis is known to be slices in space
    bands_last: bool | None = None  # None where the file does not say
    way: str = ""  # what to do where it holds more than one volume


def _array(file: Path, large: bool) -> _Numbers:
    suffix = file.suffix.lower()
    if suffix == ".npy":
        try:
            return _Numbers(np.load(file, allow_pickle=False))
        except ValueError as error:
            raise ProbeError("it is no .npy file of numbers") from error
    if suffix in (".tif", ".tiff"):
        with _package("tifffile", file).TiffFile(file) as opened:
            series, most = opened.series[0], Image.MAX_IMAGE_PIXELS
            pixels = series.keyframe.imagewidth * series.keyframe.imagelength
            if most is not None and pixels > most and not large:
                raise _too_large(f"Image size ({pixels} pixels) exceeds limit of {most} pixels")
            return _Numbers(np.asarray(series.asarray()), "Z" in series.axes, series.axes.endswith("S") or None)
    volume = _package("nibabel", file).load(file)
    values = np.asarray(volume.get_fdata(dtype=np.float32))  # (x, y, z) or (x, y, z, t)
    axes = (2, 1, 0)[-values.ndim :] if values.ndim > 2 else (1, 0)
    way = f'. Save one of its volumes: nibabel.save(nibabel.load("{file.name}").slicer[..., 0], "one.nii.gz")'
    several = values.ndim > 3
    return _Numbers(
        values.transpose(*axes, *range(3, values.ndim)), values.ndim > 2, several or None, way if several else ""
    )


def _dicom(files: Sequence[Path]) -> _Numbers:
    """Read a series, rescaled to its unit, in the order of its slices' positions."""
    slices = sorted((_header(file) for file in files), key=_position)
    read = [_rescaled(one) for one in slices]
    frames = int(getattr(slices[0], "NumberOfFrames", 1) or 1) > 1
    if len(read) == 1:
        return _Numbers(read[0], frames, int(getattr(slices[0], "SamplesPerPixel", 1)) > 1 or None)
    return _Numbers(np.stack(read), True)


def _header(file: Path, **options: Any) -> Any:
    pydicom = _package("pydicom", file)
    try:
        return pydicom.dcmread(file, **options)
    except pydicom.errors.InvalidDicomError as error:
        raise ProbeError("it is no DICOM file") from error


def _rescaled(header: Any) -> np.ndarray[Any, Any]:
    """Return the pixels in their unit; bytes without one stay bytes."""
    pixels = np.asarray(header.pixel_array)
    slope, intercept = float(getattr(header, "RescaleSlope", 1)), float(getattr(header, "RescaleIntercept", 0))
    if pixels.dtype == np.uint8 and (slope, intercept) == (1, 0):
        return pixels
    return pixels.astype(np.float32) * slope + intercept


def _position(header: Any) -> float:
    """Return where a slice lies along the normal of its plane, or its number."""
    place, axes = getattr(header, "ImagePositionPatient", None), getattr(header, "ImageOrientationPatient", None)
    if place is not None and axes is not None:
        return float(np.dot(np.cross(np.array(axes[:3], float), np.array(axes[3:], float)), np.array(place, float)))
    return float(getattr(header, "InstanceNumber", 0) or 0)


def dicom_series(files: Sequence[Path]) -> list[list[Path]]:
    """Group DICOM files by their series; a file that is no DICOM file is alone, and refused when it is read."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        try:
            series = str(getattr(_header(file, stop_before_pixels=True), "SeriesInstanceUID", file.parent))
        except ProbeError:
            series = str(file)
        groups.setdefault(series, []).append(file)
    return list(groups.values())


def _channels_first(read: _Numbers, channels: int | None, volume: bool) -> tuple[np.ndarray[Any, Any], str]:
    """Return (channels, H, W), or (channels, D, H, W) of a volume, and which part of the file it is."""
    values, size, part = read.values, 2 + volume, ""
    values = values.astype(np.uint8) * 255 if values.dtype == bool else values
    while values.ndim > size + 1 and 1 in values.shape:
        values = values.squeeze(values.shape.index(1))
    if (
        values.ndim == size + 1
        and not volume
        and (read.sliced or (channels == 1 and values.shape[0] < values.shape[2]))
    ):
        values, part = values[len(values) // 2], f"slice{len(values) // 2}"
    if values.ndim == size and not (volume and read.bands_last):
        return values[None], part
    if values.ndim != size + 1:
        axes = "three axes, or four with channels" if volume else "two axes, or three with channels"
        raise ProbeError(f"it holds numbers of shape {values.shape}, expected {axes}{read.way}")
    last = read.bands_last or (read.bands_last is None and _are_bands(values.shape[-1], values.shape[0], channels))
    return (np.moveaxis(values, -1, 0) if last else values), part


def _are_bands(last: int, first: int, channels: int | None) -> bool:
    """Return whether the last axis holds the bands, and not the first."""
    if channels is not None and (last == channels) != (first == channels):
        return last == channels
    return last < first


def _package(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ProbeError(f"{file.name} is read by {name}. {remedy(name)}") from error
