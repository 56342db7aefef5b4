"""A probe is taken from whatever gives samples by their index, or batches; files that cannot be read are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from attn_monitor import ProbeBatch, ProbeError, Watch
from tests.support.helpers import NoiseImages, tiny_vit

IMAGES = NoiseImages().images
EVEN = IMAGES[[0, 2, 4, 6, 9, 11, 13, 15]]


class Samples:
    """As Hugging Face's data sets: no class of PyTorch's, and samples are dictionaries."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"labels": index, "pixel_values": IMAGES[index]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))


class Stream:
    """Samples without indices."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(Samples())


class Batches:
    """A loader of its own kind, as DALI's or FFCV's."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([[images] for images in IMAGES.split(4)])


def fabric_loader(shuffle: bool) -> Any:
    fabric = Fabric(accelerator="cpu", devices=1)
    return fabric.setup_dataloaders(DataLoader(NoiseImages(), batch_size=4, shuffle=shuffle))


@pytest.mark.parametrize(
    ("data", "images"),
    [
        (Samples(), EVEN),
        (list(IMAGES), EVEN),
        (Stream(), IMAGES[:8]),
        (Batches(), IMAGES[:4]),
        (list(IMAGES.split(4)), IMAGES[:4]),
        (fabric_loader(False), EVEN),
    ],
)
def test_what_gives_samples_or_batches(tmp_path: Path, data: Any, images: Tensor) -> None:
    with Watch(tiny_vit(), data, folder=tmp_path) as watch:
        assert watch.step(0, batch=torch.zeros(2, 3, 32, 32)) is not None
    assert watch.monitor is not None
    assert torch.equal(watch.monitor.probe.images, images)
    assert watch.monitor.probe.caption == "original"


def test_fabrics_loader_of_shuffled_data(tmp_path: Path) -> None:
    watch = Watch(tiny_vit(), fabric_loader(True), folder=tmp_path)
    assert watch.step(0) is not None
    watch.close()
    assert watch.monitor is not None
    assert watch.monitor.probe.caption == "training crop"


def test_data_that_cannot_be_asked_leave_the_batch(tmp_path: Path) -> None:
    def broken() -> Iterator[Tensor]:
        raise OSError("disk")
        yield torch.zeros(1)

    watch = Watch(tiny_vit(), broken(), folder=tmp_path)
    with pytest.warns(UserWarning, match="finding images of the data failed.*OSError: disk"):
        watch.step(0, batch=IMAGES[:3])
    watch.close()
    assert watch.monitor is not None
    assert torch.equal(watch.monitor.probe.images, IMAGES[:3])
    assert watch.monitor.probe.caption == "training crop"


@pytest.mark.parametrize("data", [{"validation": Samples()}, tiny_vit(), 3])
def test_what_is_no_data_set(tmp_path: Path, data: Any) -> None:
    with pytest.raises(ValueError, match=f"probe: received a {type(data).__name__}.*a data set or its loader"):
        Watch(tiny_vit(), data, folder=tmp_path)


def write_images(folder: Path, masks: Path) -> None:
    folder.mkdir(), masks.mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / f"{name}.png")
        Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(masks / f"{name}.png")


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_masks_are_named(tmp_path: Path, damage: str) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    write_images(images, masks)
    for name in ("a", "c"):
        whole = (masks / f"{name}.png").read_bytes()
        damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no picture"}[damage]
        (masks / f"{name}.png").write_bytes(damaged)
    named = r"masks folder .*masks: cannot read a\.png \(.*\); c\.png \(.*\); expected PNGs.*Replace these files"
    with pytest.raises(ProbeError, match=named):
        ProbeBatch.from_folder(images, size=32, masks=masks)
    with pytest.raises(ProbeError, match=r"cannot read a\.png \([^;]*; expected"):
        ProbeBatch.from_folder(images / "a.png", size=32, masks=masks)
