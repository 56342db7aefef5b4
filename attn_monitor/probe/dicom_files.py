"""Read DICOM files: one image each, or the slices of a series as a volume."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from attn_monitor.errors import ProbeError
from attn_monitor.probe.file_numbers import SUFFIXES, FileNumbers, Numbers, package

_UNEVEN = 1.5  # of the usual distance between slices; without one of them it is twice


def is_dicom(file: Path) -> bool:
    """Return whether a file is DICOM, by its suffix, or by its first bytes where its suffix is of no other image.

    Archives of images name files by numbers, which look like suffixes, or without one.
    """
    suffix = file.suffix.lower()
    if suffix == ".dcm" or suffix in SUFFIXES or file.name == "DICOMDIR":
        return suffix == ".dcm"
    try:
        with file.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_series(files: Sequence[Path]) -> list[list[Path]]:
    """Group DICOM files by series, plane and size; a file that is no DICOM file is alone, and refused when it is read.

    A survey image that belongs to a series lies in another plane.
    """
    groups: dict[tuple[Any, ...], list[Path]] = {}
    for file in files:
        try:
            header = _header(file, stop_before_pixels=True)
        except ProbeError:
            groups[(file,)] = [file]
            continue
        plane = tuple(round(float(x), 2) for x in header.get("ImageOrientationPatient", None) or ())
        size = header.get("Rows"), header.get("Columns")
        groups.setdefault((str(header.get("SeriesInstanceUID", file.parent)), plane, size), []).append(file)
    return list(groups.values())


def read_dicom(files: Sequence[Path]) -> FileNumbers:
    """Read a file, or a series in the order of its slices' positions, rescaled to its unit.

    Raises:
        ProbeError: A file is no DICOM file, or slices do not lie evenly. pydicom raises nearly anything else.
    """
    slices = sorted(((_header(file), file) for file in files), key=lambda one: _order(one[0]))
    headers = [header for header, _ in slices]
    last = "c" if int(headers[0].get("SamplesPerPixel", 1)) > 1 else ""
    white_is_low = headers[0].get("PhotometricInterpretation") == "MONOCHROME1"
    if len(slices) > 1:
        places = [_place(header.get("ImagePositionPatient"), header) for header in headers]
        _check_even(places, [file.name for _, file in slices])
        return FileNumbers(np.stack([_rescaled(header) for header in headers]), f"zyx{last}", white_is_low)
    values = _rescaled(headers[0])
    if int(headers[0].get("NumberOfFrames", 1) or 1) == 1:
        return FileNumbers(values, f"yx{last}", white_is_low)
    places = [
        _place(_of_frame(headers[0], n, "PlanePosition", "ImagePositionPatient"), headers[0])
        for n in range(len(values))
    ]
    order = range(len(values)) if None in places else np.argsort(np.array(places, float), kind="stable")
    _check_even([places[n] for n in order], [f"frame {n}" for n in order])
    return FileNumbers(values[list(order)], f"zyx{last}", white_is_low)


def _header(file: Path, **options: Any) -> Any:
    pydicom = package("pydicom", file)
    try:
        return pydicom.dcmread(file, **options)
    except pydicom.errors.InvalidDicomError as error:
        raise ProbeError("it is no DICOM file") from error


def _of_frame(header: Any, frame: int, group: str, name: str) -> Any:
    """Return a value of a frame, or of all frames, of a file with several; None without one."""
    for groups, number in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        found = header.get(groups, None)
        part = found[number].get(f"{group}Sequence", None) if found else None
        if part:
            return part[0].get(name, None)
    return None


def _rescaled(header: Any) -> Numbers:
    """Return the pixels in their unit; bytes without one stay bytes."""
    pixels = np.asarray(header.pixel_array)
    slope, intercept = header.get("RescaleSlope", None), header.get("RescaleIntercept", None)
    if slope is None and intercept is None:  # of each frame, in files of several
        count = int(header.get("NumberOfFrames", 1) or 1)
        names = ("RescaleSlope", "RescaleIntercept")
        found = [[_of_frame(header, n, "PixelValueTransformation", name) for n in range(count)] for name in names]
        slope, intercept = (None if None in values else np.array(values, float) for values in found)
    slope, intercept = (np.float32(default if v is None else v) for v, default in ((slope, 1), (intercept, 0)))
    if pixels.dtype == np.uint8 and (slope == 1).all() and (intercept == 0).all():
        return pixels
    slope, intercept = (v.reshape(-1, *[1] * (pixels.ndim - 1)) if v.size > 1 else v for v in (slope, intercept))
    values: Numbers = pixels.astype(np.float32) * slope + intercept
    return values


def _place(position: Any, header: Any) -> float | None:
    """Return where a slice lies along the normal of its plane, in mm."""
    axes = header.get("ImageOrientationPatient", None) or _of_frame(
        header, 0, "PlaneOrientation", "ImageOrientationPatient"
    )
    if position is None or axes is None:
        return None
    return float(np.dot(np.cross(np.array(axes[:3], float), np.array(axes[3:], float)), np.array(position, float)))


def _order(header: Any) -> tuple[float, float]:
    place, number = _place(header.get("ImagePositionPatient", None), header), header.get("InstanceNumber", None)
    return place or 0.0, float(number or 0)


def _check_even(places: Sequence[float | None], names: Sequence[str]) -> None:
    """Refuse slices at one place among others, and gaps; frames over time are all at one place, or at none."""
    if None in places or len(places) < 3 or len(set(places)) == 1:
        return
    gaps = [second - first for first, second in pairwise(p for p in places if p is not None)]
    usual = float(np.median(gaps))
    for gap, (first, second) in zip(gaps, pairwise(names), strict=True):
        if gap <= usual / 100:
            raise ProbeError(
                f"{first} and {second} show the same slice, expected each slice once. Keep each phase or repetition in "
                "a folder of its own, or frames in a file of their own"
            )
        if gap > _UNEVEN * usual:
            raise ProbeError(
                f"{first} and {second} lie {gap:.4g} mm apart, and most slices {usual:.4g} mm, expected even "
                "distances. Add the slices that are missing, or save a part without gaps, such as as NIfTI"
            )
