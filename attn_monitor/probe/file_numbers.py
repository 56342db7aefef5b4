"""Numbers of `.npy`, TIFF and NIfTI files, with the axes that the file names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attn_monitor.errors import ProbeError
from attn_monitor.extras import remedy

PHOTOGRAPHS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
ARRAYS = {".npy", ".nii", ".gz", ".dcm"}  # .gz is .nii.gz
SUFFIXES = frozenset(PHOTOGRAPHS | ARRAYS)
Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FileNumbers:
    """Hold what a file's pixels are.

    Attributes:
        values: Numbers in the file's own unit.
        axes: A letter for each dimension: "c" channels, "z" slices or frames, "y" rows, "x" columns, "?" where the file
            does not say.
        white_is_low: Whether the smallest number is white.
        way: What to do where it holds more than one volume.
    """

    values: Numbers
    axes: str
    white_is_low: bool = False
    way: str = ""


def numbers_of(file: Path, large: bool) -> FileNumbers:
    """Read a `.npy`, TIFF or NIfTI file.

    Args:
        file: The file.
        large: Whether to read images with more pixels than Pillow's limit.

    Raises:
        ProbeError: It is none, or a package is missing. Libraries raise nearly anything else.
    """
    suffix = file.suffix.lower()
    if suffix == ".npy":
        try:
            values = np.load(file, allow_pickle=False)
        except ValueError as error:
            raise ProbeError("it is no .npy file of numbers") from error
        return FileNumbers(values, "?" * values.ndim)
    return _tiff(file, large) if suffix in (".tif", ".tiff") else _nifti(file)


def _tiff(file: Path, large: bool) -> FileNumbers:
    with package("tifffile", file).TiffFile(file) as opened:
        series, most = opened.series[0], Image.MAX_IMAGE_PIXELS
        pixels = series.keyframe.imagewidth * series.keyframe.imagelength
        if most is not None and pixels > most and not large:
            raise too_large(f"Image size ({pixels} pixels) exceeds limit of {most} pixels")
        try:
            values = np.asarray(series.asarray())
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise ProbeError(
                f"{str(error).removesuffix('.')}, which decompresses it. {remedy('imagecodecs')}"
            ) from error
        names = {"C": "c", "S": "c", "Z": "z", "T": "z", "Y": "y", "X": "x"}
        axes = "".join(names.get(axis, "?") for axis in series.axes)
        # Of pages without a name only a channel beside them says that they are slices.
        return FileNumbers(values, axes.replace("?", "z") if "c" in axes else "?" * len(axes) if "?" in axes else axes)


def _nifti(file: Path) -> FileNumbers:
    volume = package("nibabel", file).load(file)
    if volume.get_data_dtype().fields:
        raise ProbeError("it holds colours in each voxel, expected numbers. Save one channel, or channels as volumes")
    values = np.asarray(volume.get_fdata(dtype=np.float32))  # (x, y, z) or (x, y, z, t)
    while values.ndim > 4 and 1 in values.shape[3:]:
        values = values.squeeze(3 + values.shape[3:].index(1))
    space = min(values.ndim, 3)
    values = values.transpose(*range(space)[::-1], *range(space, values.ndim))
    if values.ndim < 4:
        return FileNumbers(values, "zyx"[-space:])
    way = f'. Save one of its volumes: nibabel.save(nibabel.load("{file.name}").slicer[..., 0], "one.nii.gz")'
    return FileNumbers(values, "zyx" + "c" * (values.ndim - 3), way=way)


def too_large(reason: str) -> ProbeError:
    """Return the refusal of an image of more pixels than Pillow's limit, with the argument that allows it."""
    return ProbeError(
        f"{reason.partition(',')[0]}, as a decompression bomb has. If you trust it, pass large_images=True, "
        "or --large_images true to a command"
    )


def package(name: str, file: Path) -> Any:
    """Import a package of the extra "formats"; `ProbeError` where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ProbeError(f"{file.name} is read by {name}. {remedy(name)}") from error
