"""Files for models that take frames before channels, or spectrograms without channels: the model is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn

from attn_monitor import AttentionSnapshot, ProbeBatch, ProbeOptions, Watch
from attn_monitor.capture.image_channels import image_channels
from attn_monitor.commands.backfill import probe_of
from attn_monitor.commands.check import check
from attn_monitor.commands.show import show
from attn_monitor.errors import ArgumentError, AttnMonitorError
from tests.support.helpers import tiny_vit
from tests.support.more_axes import AnyViT

CLIP = np.stack([data.astronaut()[n * 8 : n * 8 + 64, 128:192] for n in range(6)])  # a camera that moves, (T, H, W, 3)


class FramesFirst(AnyViT):
    """A ViT on (B, T, C, H, W), as video models of Hugging Face are."""

    def __init__(self) -> None:
        super().__init__((6, 64, 64), (2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2))


class Spectrograms(AnyViT):
    """A ViT on (B, T, F), as audio models of Hugging Face are."""

    def __init__(self) -> None:
        super().__init__((64, 32), (8, 8), channels=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None])


class Volumes(AnyViT):
    """A ViT on (B, 1, D, H, W)."""

    def __init__(self) -> None:
        super().__init__((6, 64, 64), (2, 16, 16), channels=1)


def _write(folder: Path) -> None:
    (folder / "clips").mkdir()
    (folder / "sounds").mkdir()
    np.save(folder / "clips/a.npy", CLIP)
    np.save(folder / "clips/b.npy", CLIP[::-1].transpose(0, 3, 1, 2))  # (T, 3, H, W)
    np.save(folder / "sounds/a.npy", np.random.default_rng(0).normal(-30, 10, (64, 32)).astype(np.float32))


def test_the_order_is_asked_of_the_model() -> None:
    assert image_channels(FramesFirst(), (6, 64, 64)) == (3, "tchw")
    assert image_channels(Spectrograms(), (64, 32)) == (1, "tf")
    assert image_channels(AnyViT((8, 16, 16), (2, 8, 8), channels=4), (8, 16, 16)) == (4, "cdhw")


@pytest.mark.parametrize(
    ("model", "folder", "size", "grid"),
    [(FramesFirst, "clips", (6, 64, 64), (3, 4, 4)), (Spectrograms, "sounds", (64, 32), (8, 4))],
)
def test_commands_and_runs(
    model: type[nn.Module],
    folder: str,
    size: tuple[int, ...],
    grid: tuple[int, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path)
    name = f"tests.integration.test_orders_of_files:{model.__name__}"
    check(name, size=size)
    assert f"grid {' × '.join(map(str, grid))} (places exact)" in capsys.readouterr().out
    show(name, folder, size=size, out="shown")
    shown = AttentionSnapshot.load(tmp_path / "shown/attention.npz").layer("backbone")
    assert shown.grid == grid
    probe = ProbeBatch.load(tmp_path / "shown/probe.npz")
    asked = model()
    assert torch.equal(probe.images, probe_of(folder, asked, size, 8, None).images)
    if folder == "clips":
        frames = torch.from_numpy(CLIP.copy()).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (probe.mean, probe.std))
        torch.testing.assert_close(probe.images[0], (frames - mean) / std)
        torch.testing.assert_close(probe.images[1], probe.images[0].flip(0))
        assert probe.shown_caption == "original, mean of 6 frames"
    with Watch({"backbone": asked}, ProbeOptions(folder, image_size=size), folder="run", total_steps=1) as watch:
        watch.step(0)
        watch.close(1)
    watched = ProbeBatch.load(next(tmp_path.glob("run/**/probe.npz")))
    assert torch.equal(watched.images, probe.images)
    assert watched.image_axes == probe.image_axes
    last = AttentionSnapshot.load(sorted(tmp_path.glob("run/**/step-*.npz"))[-1])
    assert last.layer("backbone").grid == grid


def test_axes_of_a_folder_are_obeyed(tmp_path: Path) -> None:
    _write(tmp_path)
    probe = ProbeOptions(tmp_path / "clips", image_size=(6, 64, 64), axes="tchw").load()
    assert probe is not None
    assert probe.images.shape == (2, 6, 3, 64, 64)
    with pytest.raises(ArgumentError, match=r"axes='tchw': files hold 3 channels and 2 axes"):
        ProbeBatch.from_folder(_photo(tmp_path), axes="tchw")
    with pytest.raises(ArgumentError, match=r"axes='hw': files hold 3 channels and 2 axes"):
        ProbeBatch.from_folder(_photo(tmp_path), axes="hw")


def _photo(folder: Path) -> Path:
    (folder / "photos").mkdir(exist_ok=True)
    Image.fromarray(data.camera()).save(folder / "photos/a.png")
    return folder / "photos"


def test_another_size_is_read_with_the_models_channels(tmp_path: Path) -> None:
    """A model of one channel and of one size: the folder is read again in that size, and in grey."""
    model = tiny_vit(in_chans=1, dynamic_img_size=False)
    with Watch({"backbone": model}, ProbeOptions(_photo(tmp_path)), folder=tmp_path / "run", total_steps=1) as watch:
        watch.step(0)
        watch.close(1)
    assert ProbeBatch.load(next(tmp_path.rglob("probe.npz"))).images.shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("model", "folder", "size", "text"),
    [
        (FramesFirst, "clips", None, r'a\.npy: .* a size of three numbers: .* --size "\[6, 64, 64\]"'),
        (Volumes, "volumes", None, r"Pass another --size: .*; the first file has \[6, 64, 64\] or \[64, 64\]"),
        (Spectrograms, "sounds", 32, r"Pass another --size: .* \[time, frequency\]; the first file has \[64, 32\]"),
    ],
)
def test_a_size_that_a_command_needs_is_named(
    model: type[nn.Module], folder: str, size: int | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path)
    (tmp_path / "volumes").mkdir()
    np.save("volumes/a.npy", CLIP[..., 0])
    name = f"tests.integration.test_orders_of_files:{model.__name__}"
    with pytest.raises(AttnMonitorError, match=text) as refused:
        show(name, folder, size=size, out="shown")
    assert "forward=" not in str(refused.value)
    with pytest.raises(AttnMonitorError, match="Pass another --size: a number"):
        check(name)
