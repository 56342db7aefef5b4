"""Write DICOM files of CT slices as scanners do: unsigned 16 bits, with slope and intercept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def empty_header() -> FileDataset:
    """A header without pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    return header


def write_slice(path: Path, values: np.ndarray, series: str, place: float, **fields: Any) -> None:
    """Write numbers from -1024 on, (H, W) or frames of it, at a place along z in mm; a field of None is left out."""
    header = empty_header()
    header.SeriesInstanceUID, header.Modality = series, "CT"
    header.ImagePositionPatient, header.ImageOrientationPatient = [0, 0, place], [1, 0, 0, 0, 1, 0]
    header.Rows, header.Columns = values.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation = 15, 0
    header.RescaleSlope, header.RescaleIntercept = 1, -1024
    if values.ndim == 3:
        header.NumberOfFrames = len(values)
    for name, value in fields.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    header.PixelData = (values + 1024).astype(np.uint16).tobytes()
    header.save_as(path, enforce_file_format=True)


def write_series(folder: Path, volume: np.ndarray, order: Sequence[int] = (2, 0, 3, 1), names: str = "{}.dcm") -> None:
    """Write slices 2.5 mm apart, named a, b, … in another order than they lie in space."""
    folder.mkdir(exist_ok=True)
    series = generate_uid()
    for letter, number in zip("abcdefgh", order, strict=False):
        write_slice(folder / names.format(letter), volume[number], series, 2.5 * number)
