"""DICOM as scanners and archives leave it: unordered, without suffixes, with gaps, surveys and phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from attn_monitor import ProbeBatch, ProbeError
from tests.support.dicom_files import write_series, write_slice

VOLUME = np.random.default_rng(0).integers(-1000, 2000, (6, 16, 12))
SIZE = VOLUME.shape


def _volumes(path: Path, size: Any = SIZE, **options: Any) -> ProbeBatch:
    return ProbeBatch.from_folder(path, size=size, channels=1, **options)


@pytest.mark.parametrize("names", ["IM000{}", "1.2.840.113564.{}", "{}.dcm"])
def test_files_are_known_by_their_first_bytes(tmp_path: Path, names: str) -> None:
    write_series(tmp_path, VOLUME, (3, 0, 5, 1, 4, 2), names)
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")  # the list of a disc, without pixels
    (tmp_path / "notes").write_text("no image")
    probe = _volumes(tmp_path)
    assert np.array_equal(probe.images[0, 0].numpy(), VOLUME)
    assert probe.names == (names.format("a").removesuffix(".dcm"),)
    assert len(_volumes(tmp_path, (16, 12))) == 6
    assert len(_volumes(tmp_path / names.format("c"), (16, 12))) == 1


def test_slices_must_lie_evenly(tmp_path: Path) -> None:
    write_series(tmp_path, VOLUME, (0, 1, 2, 4, 5))
    with pytest.raises(ProbeError, match=r"c\.dcm and d\.dcm lie 5 mm apart, and most slices 2\.5 mm"):
        _volumes(tmp_path)
    write_slice(tmp_path / "z.dcm", VOLUME[3], _uid_of(tmp_path / "a.dcm"), 7.5)  # the slice that is missing
    assert np.array_equal(_volumes(tmp_path).images[0, 0].numpy(), VOLUME)


def _uid_of(file: Path) -> str:
    import pydicom

    return str(pydicom.dcmread(file).SeriesInstanceUID)


def test_phases_of_one_series_are_not_one_volume(tmp_path: Path) -> None:
    series = generate_uid()
    for phase in range(2):
        for number in range(6):
            write_slice(tmp_path / f"{phase}{number}.dcm", VOLUME[number] + phase, series, 2.5 * number)
    with pytest.raises(ProbeError, match=r"00\.dcm and 10\.dcm show the same slice.* Keep each phase"):
        _volumes(tmp_path)
    for phase in range(2):  # the way out
        (tmp_path / f"phase{phase}").mkdir()
        for file in sorted(tmp_path.glob(f"{phase}?.dcm")):
            file.rename(tmp_path / f"phase{phase}" / file.name)
    images = _volumes(tmp_path).images[:, 0].numpy()
    assert np.array_equal(images, np.stack([VOLUME, VOLUME + 1]))


def test_a_survey_image_of_the_series_is_named(tmp_path: Path) -> None:
    write_series(tmp_path, VOLUME, range(6))
    plane = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    write_slice(tmp_path / "survey.dcm", np.zeros((40, 40)), _uid_of(tmp_path / "a.dcm"), 0, **plane)
    with pytest.raises(ProbeError, match=r"cannot read survey\.dcm: it holds numbers of shape \(40, 40\)"):
        _volumes(tmp_path)
    left_out: list[str] = []
    assert np.array_equal(_volumes(tmp_path, onerror=left_out.append).images[0, 0].numpy(), VOLUME)
    assert len(left_out) == 1


@pytest.mark.parametrize("each", [False, True])
def test_units_and_places_of_frames(tmp_path: Path, each: bool) -> None:
    """Enhanced CT and MR keep slope, intercept and place beside each frame, or beside all of them."""

    def group(name: str, **values: Any) -> Dataset:
        inner, outer = Dataset(), Dataset()
        for key, value in values.items():
            setattr(inner, key, value)
        setattr(outer, f"{name}Sequence", Sequence([inner]))
        return outer

    order = [3, 0, 5, 1, 4, 2]
    fields: dict[str, Any] = {}
    if each:
        frames = [group("PlanePosition", ImagePositionPatient=[0, 0, 2.5 * n]) for n in order]
        for frame, number in zip(frames, order, strict=True):
            unit = group("PixelValueTransformation", RescaleSlope=number + 1, RescaleIntercept=-1024 * (number + 1))
            frame.PixelValueTransformationSequence = unit.PixelValueTransformationSequence
        fields["PerFrameFunctionalGroupsSequence"] = Sequence(frames)
        plane = group("PlaneOrientation", ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
        fields["SharedFunctionalGroupsSequence"] = Sequence([plane])
    else:
        shared = group("PixelValueTransformation", RescaleSlope=1, RescaleIntercept=-1024)
        fields["SharedFunctionalGroupsSequence"] = Sequence([shared])
    without = dict.fromkeys(("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient"))
    write_slice(tmp_path / "a.dcm", VOLUME[order] if each else VOLUME, generate_uid(), 0, **fields, **without)
    expected = VOLUME * np.arange(1, 7)[:, None, None] if each else VOLUME
    assert np.array_equal(_volumes(tmp_path).images[0, 0].numpy(), expected)


def test_white_may_be_the_smallest_number(tmp_path: Path) -> None:
    """X-ray films: a picture is turned, numbers stay as they are in the file."""
    write_slice(tmp_path / "a.dcm", VOLUME[0], generate_uid(), 0, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(_volumes(tmp_path, SIZE[1:]).images[0, 0].numpy(), VOLUME[0])
    shown = ProbeBatch.from_folder(tmp_path, size=SIZE[1:], channels=3).pixels[0, ..., 0].astype(float)
    assert np.corrcoef(shown.ravel(), VOLUME[0].ravel())[0, 1] < -0.99


def test_frames_over_time_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    series = generate_uid()
    for name, number in zip("abcdef", (3, 0, 5, 1, 4, 2), strict=True):
        write_slice(tmp_path / f"{name}.dcm", VOLUME[number], series, 5.0, InstanceNumber=number + 1)
    assert np.array_equal(_volumes(tmp_path).images[0, 0].numpy(), VOLUME)
