"""Forms in which people keep bands and volumes: what is read of each, against what was written, or why it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage import data

from attn_monitor import ProbeBatch, ProbeError
from attn_monitor.probe.labelled import batches

RNG = np.random.default_rng(0)
BANDS = RNG.integers(100, 9000, (4, 40, 48)).astype(np.uint16)
CLIP = RNG.normal(size=(6, 3, 20, 24)).astype(np.float32)  # frames, channels


def _read(path: Path, size: Any, channels: int | None, **options: Any) -> ProbeBatch:
    return ProbeBatch.from_folder(path, size=size, channels=channels, **options)


@pytest.mark.parametrize("extra", ["unspecified", "unassalpha"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_fourth_band_of_a_coloured_tiff_is_read(tmp_path: Path, kind: Any, extra: str) -> None:
    """Pillow knows of the first three alone where the fourth is no alpha, such as infrared of NAIP and PlanetScope."""
    tile = np.dstack([data.astronaut(), data.camera()]).astype(kind)
    tifffile.imwrite(tmp_path / "tile.tif", tile, photometric="rgb", extrasamples=[extra])
    probe = _read(tmp_path, 512, 4, mean=(0,) * 4, std=(1,) * 4)
    expected = tile.transpose(2, 0, 1).astype(np.float32) / (255 if kind is np.uint8 else 1)
    assert np.array_equal(probe.images[0].numpy(), expected)


def test_named_axes_of_tiff(tmp_path: Path) -> None:
    stack = RNG.integers(0, 999, (4, 2, 40, 48)).astype(np.uint16)  # slices, channels
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata={"axes": "ZCYX"})
    assert np.array_equal(_read(tmp_path, (4, 40, 48), 2).images[0].numpy(), stack.swapaxes(0, 1))
    middle = _read(tmp_path, (40, 48), 2)
    assert middle.names == ("a-slice2",)
    assert np.array_equal(middle.images[0].numpy(), stack[2])
    (tmp_path / "a.tif").unlink()
    tifffile.imwrite(tmp_path / "a.ome.tif", stack[:, 0], metadata={"axes": "ZYX"})
    assert np.array_equal(_read(tmp_path, (40, 48), 4).images[0].numpy(), stack[:, 0])  # a stack as channels
    with pytest.raises(ProbeError, match=r"shape \(4, 40, 48\), slices of one channel, expected .* with 2 channels"):
        _read(tmp_path, (40, 48), 2)
    (tmp_path / "a.ome.tif").unlink()
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([data.astronaut(), data.astronaut()[::-1]]), photometric="rgb")
    frames = _read(tmp_path, (2, 512, 512), 3, mean=(0,) * 3, std=(1,) * 3).images[0] * 255
    assert np.array_equal(frames[:, 1].round().numpy(), data.astronaut()[::-1].transpose(2, 0, 1))


@pytest.mark.parametrize(("stored", "channels"), [((0, 1), 3), ((1, 0), 3), ((0, -1), 3)])
def test_clips_with_channels_at_any_place(tmp_path: Path, stored: tuple[int, int], channels: int) -> None:
    clip = CLIP if stored == (0, 1) else CLIP.swapaxes(0, 1) if stored == (1, 0) else np.moveaxis(CLIP, 1, -1)
    np.save(tmp_path / "clip.npy", clip)
    assert np.array_equal(_read(tmp_path, (6, 20, 24), channels).images[0].numpy(), CLIP.swapaxes(0, 1))


def test_more_bands_than_lines(tmp_path: Path) -> None:
    """Hyperspectral scenes such as Indian Pines: 145 × 145 pixels, 200 bands."""
    scene = RNG.integers(900, 9000, (14, 14, 20)).astype(np.int16)
    np.save(tmp_path / "scene.npy", scene)
    for channels in (20, None):
        assert np.array_equal(_read(tmp_path, 14, channels).images[0].numpy(), scene.transpose(2, 0, 1))
    with pytest.raises(ProbeError, match=r"shape \(14, 14, 20\), expected .* with 1 channels"):
        _read(tmp_path, 14, 1)


def test_one_slice_needs_no_number(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BANDS[:1])
    nibabel.save(nibabel.Nifti1Image(BANDS[:1].transpose(2, 1, 0).astype(np.int16), np.eye(4)), tmp_path / "b.nii")
    probe = _read(tmp_path, (40, 48), 1)
    assert probe.names == ("a", "b")
    assert np.array_equal(probe.images.numpy(), np.stack([BANDS[:1]] * 2).astype(np.float32))


def test_bytes_in_grey_are_not_stretched(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", data.camera() // 3)
    Image.fromarray(data.camera() // 3).save(tmp_path / "b.png")
    probe = _read(tmp_path, 512, 3)
    assert torch.equal(probe.images[0], probe.images[1])


@pytest.mark.parametrize(("kind", "channels"), [("npy", 1), ("npy", 3), ("tif", 3), ("nii", 1)])
def test_missing_values_are_refused_with_the_file(tmp_path: Path, kind: str, channels: int) -> None:
    values = BANDS[0].astype(np.float32)
    values[:10] = np.nan
    if kind == "npy":
        np.save(tmp_path / "dem.npy", values)
    elif kind == "tif":
        tifffile.imwrite(tmp_path / "dem.tif", values)
    else:
        nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4)), tmp_path / "dem.nii")
    with pytest.raises(ProbeError, match=rf"dem\.{kind}: 25\.0% of its values are NaN .* Fill them, such as by numpy"):
        _read(tmp_path, (40, 48), channels)


@pytest.mark.parametrize("other", [BANDS[0], data.camera() / 255])
def test_units_are_not_mixed(tmp_path: Path, other: np.ndarray) -> None:
    Image.fromarray(data.camera()).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", other)
    with pytest.raises(ProbeError, match=r"a\.png holds values from 0 to 1 by its format, and b\.npy numbers"):
        _read(tmp_path, 32, 1)
    np.save(tmp_path / "b.npy", (other / other.max() * 255).astype(np.uint8))  # the way out
    assert len(_read(tmp_path, 32, 1)) == 2


def test_what_decompresses_a_tiff_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Image.fromarray(band) for band in BANDS]
    pages[0].save(tmp_path / "lzw.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")

    def missing(*_: Any, **__: Any) -> None:  # as where imagecodecs is not installed
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", missing)
    with pytest.raises(ProbeError, match=r"LZW.* package, which decompresses it\. Run: pip install imagecodecs"):
        _read(tmp_path, (40, 48), 4)


def test_colours_in_voxels_are_refused(tmp_path: Path) -> None:
    colours = np.zeros((24, 20, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), tmp_path / "dti.nii")
    with pytest.raises(ProbeError, match=r"dti\.nii: it holds colours in each voxel"):
        _read(tmp_path, (6, 20, 24), 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_labelled_images_have_the_probes_channels(tmp_path: Path, channels: int) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(data.camera()).save(tmp_path / name / "a.png")
    probe = _read(tmp_path, 64, channels)
    ((images, labels),) = batches(tmp_path, probe, 8, 8)
    assert labels == [0, 1]
    assert torch.equal(images, probe.images)
    tifffile.imwrite(tmp_path / "dog/a.tif", BANDS[0].astype(np.float32))
    if channels == 1:
        with pytest.raises(ProbeError, match="a unit of its own"):
            list(batches(tmp_path, probe, 8, 8))
