"""Probe images of any number of channels from files of many kinds, and which of their bands are shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nibabel
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage import data

from attn_monitor import AttentionMapCallback, AttentionSnapshot, ProbeBatch, ProbeError, ProbeOptions, Watch
from attn_monitor.capture.image_channels import image_channels
from attn_monitor.commands.backfill import probe_of
from attn_monitor.commands.check import check
from attn_monitor.commands.show import show
from attn_monitor.errors import ArgumentError
from attn_monitor.probe.image_folder import read_images
from tests.support.dicom_files import empty_header, write_series
from tests.support.helpers import tiny_vit, trainer
from tests.support.more_axes import AnyViT

BANDS = (np.random.default_rng(0).random((13, 40, 48)) * np.linspace(900, 9000, 13)[:, None, None]).astype(np.uint16)


def _write(path: Path, kind: str) -> Path:
    if kind == "bands last":
        tifffile.imwrite(path / "tile.tif", BANDS.transpose(1, 2, 0))
    elif kind == "bands first":
        tifffile.imwrite(path / "tile.tif", BANDS, planarconfig="separate", photometric="minisblack")
    elif kind == "pages":
        tifffile.imwrite(path / "tile.tif", BANDS, photometric="minisblack")
    elif kind == "npy":
        np.save(path / "tile.npy", BANDS)
    else:
        np.save(path / "tile.npy", BANDS.transpose(1, 2, 0))
    return path


@pytest.mark.parametrize("channels", [13, None])
@pytest.mark.parametrize("kind", ["bands last", "bands first", "pages", "npy", "npy, bands last"])
def test_bands_enter_the_model_as_they_are_in_the_file(tmp_path: Path, kind: str, channels: int | None) -> None:
    probe = ProbeBatch.from_folder(_write(tmp_path, kind), size=(40, 48), channels=channels, bands=(3, 2, 1))
    assert torch.equal(probe.images[0], torch.from_numpy(BANDS.astype(np.float32)))
    assert probe.shown_caption == "original, bands 3, 2, 1 of 13"
    low, high = np.percentile(BANDS[[3, 2, 1]].reshape(3, -1), (0.5, 99.5), axis=1)
    expected = ((BANDS[[3, 2, 1]].transpose(1, 2, 0) - low) / (high - low)).clip(0, 1) * 255
    assert np.abs(probe.pixels[0] - expected).max() < 2
    probe.save(tmp_path / "probe.npz")
    for again in (ProbeBatch.load(tmp_path / "probe.npz"), ProbeBatch.from_state_dict(probe.state_dict())):
        assert (again.bands, again.shown_caption) == (probe.bands, probe.shown_caption)
        assert np.array_equal(again.pixels, probe.pixels)


def test_of_a_tensor_the_bands_are_said_or_taken() -> None:
    images = torch.from_numpy(BANDS[None].astype(np.float32))
    taken = ProbeOptions(images).load()
    assert taken is not None
    assert taken.shown_caption == "original, bands 0, 1, 2 of 13"
    one = ProbeOptions(images, bands=[7]).load()
    assert one is not None
    assert one.shown_caption == "original, band 7 of 13"
    assert (one.pixels[..., 0] == one.pixels[..., 2]).all()
    colour = ProbeOptions(torch.rand(1, 3, 8, 8), bands=[2, 1, 0]).load()
    assert colour is not None
    assert torch.equal(
        torch.from_numpy(colour.pixels), (colour.images[0] * 255).round().byte().flip(0).movedim(0, -1)[None]
    )
    assert ProbeOptions.of(None, bands=[2, 1, 0]).with_statistics(
        ProbeBatch(torch.rand(1, 4, 8, 8), mean=(0,) * 4, std=(1,) * 4)
    ).bands == (2, 1, 0)
    for wrong in ([1, 2], [-1], [0.5]):
        with pytest.raises(ArgumentError, match="expected one channel, or three"):
            ProbeOptions(images, bands=wrong)
    with pytest.raises(ProbeError, match="of 0 to 12"):
        ProbeOptions(images, bands=[13]).load()


def test_grey_and_deep_pictures(tmp_path: Path) -> None:
    camera = data.camera()
    Image.fromarray(camera).save(tmp_path / "a.png")
    Image.fromarray(camera.astype(np.uint16) * 257).save(tmp_path / "b.png")  # the same in 16 bits
    probe = ProbeBatch.from_folder(tmp_path, size=512, channels=1)
    assert probe.images.shape == (2, 1, 512, 512)
    assert (probe.images[0] - probe.images[1]).abs().max() < 1e-5
    assert np.array_equal(probe.pixels[0, ..., 0], camera)
    assert ProbeBatch.from_folder(tmp_path, size=64).images.shape[1] == 3  # as for photographs
    rgba = Image.fromarray(np.dstack([data.astronaut(), data.camera()]))
    (tmp_path / "four").mkdir()
    rgba.save(tmp_path / "four" / "c.png")
    four = ProbeBatch.from_folder(tmp_path / "four", size=512, channels=4, mean=(0,) * 4, std=(1,) * 4)
    assert np.array_equal((four.images[0, 3] * 255).round().numpy(), data.camera())


def test_channels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "tile.npy", BANDS)
    with pytest.raises(
        ProbeError, match=r"tile\.npy: it holds numbers of shape \(13, 40, 48\), expected .* with 4 channels"
    ):
        ProbeBatch.from_folder(tmp_path, size=32, channels=4)
    Image.fromarray(data.astronaut()).save(tmp_path / "z.png")
    with pytest.raises(ProbeError, match=r"z\.png: it holds 3 channels \(RGB\), expected 13"):
        ProbeBatch.from_folder(tmp_path, size=32, channels=13)
    with pytest.raises(ProbeError, match="some files hold 3 channels, and others 13"):
        ProbeBatch.from_folder(tmp_path, size=32)


def test_volumes_and_one_of_their_slices(tmp_path: Path) -> None:
    volume = np.random.default_rng(1).integers(-1000, 2000, (4, 32, 24))
    write_series(tmp_path / "ct", volume)
    (tmp_path / "mri").mkdir()
    nibabel.save(
        nibabel.Nifti1Image(volume.transpose(2, 1, 0).astype(np.int16), np.eye(4)), tmp_path / "mri/head.nii.gz"
    )
    for folder in ("ct", "mri"):
        read = read_images(tmp_path / folder, size=(4, 32, 24), num_images=8, channels=1)
        assert torch.equal(read.pixels, torch.from_numpy(volume.astype(np.float32))[None, None])
        assert read_images(tmp_path / folder, size=(8, 16, 16), num_images=8).pixels.shape == (1, 1, 8, 16, 16)
    whole = ProbeBatch.from_folder(tmp_path / "ct", size=(4, 32, 24), channels=1)
    assert (whole.axes, whole.names, whole.pixels.shape) == ("cdhw", ("a",), (1, 32, 24, 3))
    middle = ProbeBatch.from_folder(tmp_path / "mri", size=(32, 24), channels=1)
    assert middle.names == ("head-slice2",)
    assert torch.equal(middle.images[0, 0], torch.from_numpy(volume[2].astype(np.float32)))
    slices = ProbeBatch.from_folder(tmp_path / "ct", size=(32, 24), channels=1)
    assert torch.equal(slices.images[0, 0], torch.from_numpy(volume[2].astype(np.float32)))  # a.dcm
    assert ProbeBatch.from_folder(tmp_path / "mri", size=24, channels=3).images.shape == (1, 3, 24, 24)  # in grey


def test_bytes_of_dicom_are_from_0_to_1(tmp_path: Path) -> None:
    header = empty_header()
    header.Rows, header.Columns, header.SamplesPerPixel = 512, 512, 3
    header.PhotometricInterpretation, header.PlanarConfiguration, header.PixelRepresentation = "RGB", 0, 0
    header.BitsAllocated, header.BitsStored, header.HighBit = 8, 8, 7
    header.PixelData = data.astronaut().tobytes()
    (tmp_path / "dicom").mkdir()
    header.save_as(tmp_path / "dicom/a.dcm", enforce_file_format=True)
    (tmp_path / "png").mkdir()
    Image.fromarray(data.astronaut()).save(tmp_path / "png/a.png")
    read, expected = (ProbeBatch.from_folder(tmp_path / n, size=512, channels=3) for n in ("dicom", "png"))
    assert torch.allclose(read.images, expected.images, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        ("complex.npy", 8, "it holds complex128 values, expected real numbers"),
        ("object.npy", 8, "it is no .npy file of numbers"),
        ("text.npy", 8, "it is no .npy file of numbers"),
        ("text.dcm", (4, 8, 8), "it is no DICOM file"),
        ("photo.png", (4, 8, 8), "it is a picture of two axes, expected a volume"),
        ("photo.tif", (4, 8, 8), r"it holds numbers of shape \(512, 512, 3\), expected three axes"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, size: Any, text: str) -> None:
    if name.startswith("text"):
        (tmp_path / name).write_text("no numbers")
    elif name == "photo.tif":
        tifffile.imwrite(tmp_path / name, data.astronaut(), photometric="rgb")
    elif name == "photo.png":
        Image.fromarray(data.astronaut()).save(tmp_path / name)
    else:
        np.save(tmp_path / name, np.ones((3, 8, 8), complex) if name == "complex.npy" else np.array([{}], dtype=object))
    with pytest.raises(ProbeError, match=f"{name}: {text}"):
        ProbeBatch.from_folder(tmp_path, size=size, channels=3)


def test_a_run_reads_a_folder_of_volumes(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.random.default_rng(1).integers(-1000, 2000, (4, 32, 24)))
    options = ProbeOptions(tmp_path / "ct", image_size=(4, 32, 24))
    model = AnyViT((4, 32, 24), (2, 8, 8), channels=1)
    with Watch({"backbone": model}, options, folder=tmp_path / "run", total_steps=1) as watch:
        watch.step(0)
        watch.close(1)
    assert ProbeBatch.load(next(tmp_path.rglob("probe.npz"))).images.shape == (1, 1, 4, 32, 24)
    with pytest.raises(ArgumentError, match=r"\(depth, height, width\)"):
        ProbeOptions(tmp_path, image_size=(1, 2, 3, 4))


def test_several_volumes_in_one_file(tmp_path: Path) -> None:
    """The way that the refusal names is tried."""
    nibabel.save(nibabel.Nifti1Image(np.ones((6, 5, 4, 3), np.float32), np.eye(4)), tmp_path / "bold.nii.gz")
    for size in (4, (4, 5, 6)):
        with pytest.raises(ProbeError, match="Save one of its volumes") as refused:
            read_images(tmp_path, size=size, num_images=1, channels=1)
    way = str(refused.value).partition("volumes: ")[2].partition(")")[0]
    assert way.startswith('nibabel.save(nibabel.load("bold.nii.gz"')
    (tmp_path / "one").mkdir()
    nibabel.save(nibabel.load(tmp_path / "bold.nii.gz").slicer[..., 0], tmp_path / "one/one.nii.gz")
    read = read_images(tmp_path / "one", size=(4, 5, 6), num_images=1, channels=1)
    assert read.pixels.shape == (1, 1, 4, 5, 6)


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "head.nii")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ProbeError, match=r'head\.nii is read by nibabel\. Run: pip install "attn_monitor\[formats\]"'):
        ProbeBatch.from_folder(tmp_path, size=4)


def test_images_over_the_limit_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(data.astronaut()).save(tmp_path / "wide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ProbeError, match=r"wide\.png: .*262144 pixels.* pass large_images=True"):
        ProbeOptions(tmp_path, image_size=32).load()
    allowed = ProbeOptions(tmp_path, image_size=32, large_images=True).load()
    assert allowed is not None
    assert allowed.pixels.std() > 30
    assert Image.MAX_IMAGE_PIXELS == 1000
    (tmp_path / "bands").mkdir()
    _write(tmp_path / "bands", "pages")  # read by tifffile
    with pytest.raises(ProbeError, match=r"tile\.tif: .*1920 pixels.* pass large_images=True"):
        ProbeBatch.from_folder(tmp_path / "bands", size=32)
    assert ProbeBatch.from_folder(tmp_path / "bands", size=32, large_images=True).images.shape[1] == 13
    with pytest.raises(ArgumentError, match="expected a folder of images"):
        ProbeOptions(torch.zeros(1, 3, 8, 8), large_images=True)


def test_show_and_backfill_ask_the_model_for_its_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiles").mkdir()
    _write(tmp_path / "tiles", "bands last")
    (tmp_path / "bands_model.py").write_text(
        "from tests.support.helpers import tiny_vit\ndef build():\n    return tiny_vit(in_chans=13)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    show("bands_model:build", "tiles", size=32, out="shown", bands=(3, 2, 1))
    assert (tmp_path / "shown/tile-layer1.png").exists()
    assert ProbeBatch.load(tmp_path / "shown/probe.npz").bands == (3, 2, 1)
    assert capsys.readouterr().err == ""
    Image.fromarray(data.camera()).save(tmp_path / "camera.png")
    grey = tiny_vit(in_chans=1)
    assert image_channels(grey, (32, 32)) == (1, "chw")
    assert probe_of(str(tmp_path / "camera.png"), grey, 32, 8, None).images.shape == (1, 1, 32, 32)


class _Trained(pl.LightningModule):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.backbone = channels, tiny_vit(in_chans=channels)

    def train_dataloader(self) -> Any:
        images = (
            torch.from_numpy(BANDS[:, :32, :32].astype(np.float32)) if self.channels == 13 else torch.randn(1, 32, 32)
        )
        return torch.utils.data.DataLoader(images.expand(4, -1, -1, -1), batch_size=2)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.backbone(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("channels", [1, 13])
def test_a_run_reads_a_folder_with_its_models_channels(tmp_path: Path, channels: int) -> None:
    (tmp_path / "probe").mkdir()
    if channels == 1:
        Image.fromarray(data.camera()).save(tmp_path / "probe" / "camera.png")
    else:
        _write(tmp_path / "probe", "pages")
    callback = AttentionMapCallback(
        ProbeOptions(tmp_path / "probe", image_size=32, bands=None if channels == 1 else [3, 2, 1])
    )
    trainer(tmp_path, callback, max_steps=2).fit(_Trained(channels))
    assert callback.monitor is not None
    assert callback.monitor.probe.images.shape == (1, channels, 32, 32)
    assert next(tmp_path.rglob("step-*.npz"))


def test_volumes_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_series(tmp_path / "ct", np.random.default_rng(1).integers(-1000, 2000, (4, 32, 24)))
    (tmp_path / "volume_model.py").write_text(
        "from tests.support.more_axes import AnyViT\n"
        "def build():\n    return AnyViT((8, 32, 24), (2, 8, 8), channels=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check("volume_model:build", size=(8, 32, 24))
    assert "images of 8 × 32 × 24 with 1 channels" in (printed := capsys.readouterr().out)
    assert "grid 4 × 4 × 3 (places exact)" in printed
    show("volume_model:build", "ct", size=(8, 32, 24), out="shown", separate=True, drop_artifacts=True)
    assert AttentionSnapshot.load(tmp_path / "shown/attention.npz").layer("backbone").grid == (4, 4, 3)
    assert ProbeBatch.load(tmp_path / "shown/probe.npz").shown_caption == "original, mean of 8 slices"
    assert {"a-layer1.png", "heatmap.png", "attn-head3.png"} <= {path.name for path in (tmp_path / "shown").iterdir()}
