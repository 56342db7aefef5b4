"""Probe images from folders and tensors, and how they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from attn_monitor import ProbeBatch, ProbeError
from attn_monitor.record.file_names import MAX_NAME_BYTES, tag_safe_names


def test_photographs_come_back_for_display(photographs: Path) -> None:
    probe = ProbeBatch.from_folder(photographs, size=(96, 160))
    assert probe.names == ("astronaut", "chelsea", "coffee", "rocket")
    assert probe.images.shape == (4, 3, 96, 160)
    expected = Image.open(photographs / "coffee.png").convert("RGB")
    height = round(expected.width * 96 / 160)  # the part that a centre crop of this shape keeps
    crop = expected.crop((0, (expected.height - height) // 2, expected.width, (expected.height + height) // 2))
    reference = np.asarray(crop.resize((160, 96), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(probe.pixels[2].astype(int) - reference).mean() < 3


def test_a_folder_with_statistics_of_other_channels(photographs: Path) -> None:
    with pytest.raises(ProbeError, match="std: received 2 values, expected one for each of 3 channels"):
        ProbeBatch.from_folder(photographs, mean=(0, 0, 0), std=(1, 1))


def test_few_of_many_at_even_distances(tmp_path: Path) -> None:
    for index in range(20):
        Image.new("RGB", (40, 30), (index, 0, 0)).save(tmp_path / f"{index:02d}.png")
    assert ProbeBatch.from_folder(tmp_path, size=8, num_images=3).names == ("00", "10", "19")


def test_class_folders(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for index in range(3):
            Image.new("RGB", (9, 9)).save(tmp_path / label / f"{index}.png")
    assert ProbeBatch.from_folder(tmp_path, size=8, num_images=2).names == ("cat-0", "dog-0")


def test_every_kind_of_image(tmp_path: Path) -> None:
    red = Image.new("RGB", (20, 20), (255, 0, 0))
    red.save(tmp_path / "a rgb.png")
    red.convert("CMYK").save(tmp_path / "b.jpg")
    red.convert("P").save(tmp_path / "c.gif", save_all=True, append_images=[Image.new("P", (20, 20))])
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "d ünicode.png")
    Image.fromarray(np.full((20, 20), 60000, np.uint16)).save(tmp_path / "e.png")
    Image.new("RGB", (1, 1), (255, 0, 0)).save(tmp_path / "f.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side: the left half is shown on top
    sideways = Image.new("RGB", (40, 40))
    sideways.paste((255, 0, 0), (0, 0, 20, 40))
    sideways.save(tmp_path / "g.jpg", exif=exif, quality=95)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    pixels = dict(zip(*(lambda p: (p.names, p.pixels))(ProbeBatch.from_folder(tmp_path, size=16)), strict=True))
    for name in ("a rgb", "c", "f"):
        assert pixels[name].reshape(-1, 3).mean(0).round().tolist() == [255, 0, 0], name
    assert pixels["b"][..., 0].min() > 240
    assert pixels["d ünicode"].min() == 255  # transparent is white
    assert pixels["e"].min() > 200
    assert pixels["g"][2, 8, 0] > 200
    assert pixels["g"][13, 8, 0] < 50
    assert len(pixels) == 7


def test_every_unreadable_file_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ProbeError, match=r"cut\.png.*text\.jpg.*Remove or replace"):
        ProbeBatch.from_folder(tmp_path)


def test_decompression_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ProbeError, match=r"bomb\.png: .* as a decompression bomb has"):
        ProbeBatch.from_folder(tmp_path)


def test_masks_follow_their_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in ("binary", "indexed"):
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"{name}.jpg")
    binary = np.zeros((40, 60), np.uint8)
    binary[:, 30:] = 255
    Image.fromarray(binary).save(tmp_path / "masks" / "binary.png")
    indexed = np.zeros((40, 60), np.uint8)
    indexed[:20], indexed[20:, :30], indexed[39] = 1, 2, 255
    palette = Image.fromarray(indexed)
    palette.putpalette([value for colour in range(256) for value in (colour, 0, 0)])
    palette.save(tmp_path / "masks" / "indexed.png")
    masks = ProbeBatch.from_folder(tmp_path / "images", size=40, masks=tmp_path / "masks").masks
    assert masks is not None
    assert masks.shape == (2, 2, 40, 40)
    assert masks[0, 0, :, 20:].all()
    assert not masks[0, 0, :, :20].any()
    assert not masks[0, 1].any()
    assert masks[1, 0, :20].all()
    assert masks[1, 1, 20:39, :20].all()
    assert not masks[1, :, 39].any()
    (tmp_path / "masks" / "binary.png").unlink()
    with pytest.raises(ProbeError, match=r"no binary\.png"):
        ProbeBatch.from_folder(tmp_path / "images", masks=tmp_path / "masks")


def test_masks_without_any_object_are_no_masks(tmp_path: Path) -> None:
    for folder, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            Image.new(mode, (40, 40)).save(tmp_path / folder / f"{name}.png")
    assert ProbeBatch.from_folder(tmp_path / "images", size=40, masks=tmp_path / "masks").masks is None
    Image.new("L", (40, 40), 1).save(tmp_path / "masks" / "b.png")
    masks = ProbeBatch.from_folder(tmp_path / "images", size=40, masks=tmp_path / "masks").masks
    assert masks is not None
    assert masks.flatten(1).any(1).tolist() == [False, True]


def test_states_are_exact_and_small(tmp_path: Path, photographs: Path) -> None:
    probe = ProbeBatch.from_folder(photographs, size=64)
    assert set(probe.state_dict()["tensors"]) == {"pixels"}  # 8 bit loses nothing here
    noise = ProbeBatch(torch.randn(2, 3, 8, 8))
    assert set(noise.state_dict()["tensors"]) == {"images"}
    for original in (probe, noise):
        torch.save(original.state_dict(), tmp_path / "x.pt")
        loaded = ProbeBatch.from_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
        assert torch.equal(loaded.images, original.images)
        original.save(tmp_path / "x.npz")
        assert torch.equal(ProbeBatch.load(tmp_path / "x.npz").images, original.images)


def test_names_fit_into_tags_and_files() -> None:
    names = ["a/b", "a_b", "x" * 300, "../..", "größe 1", "", "a/b"]
    probe = ProbeBatch(torch.zeros(7, 3, 4, 4), names=names)
    assert probe.names == ("a_b", "a_b~2", "x" * 80, "_.._..", "größe 1", "image", "a_b~3")


@given(st.lists(st.text("a~2./ é界", max_size=100), min_size=1, max_size=6))
def test_names_are_different_and_stay_as_they_are(names: list[str]) -> None:
    once = tag_safe_names(names)
    assert len(set(once)) == len(names)
    assert all(len(name.encode()) <= MAX_NAME_BYTES and not name.startswith(".") for name in once)
    assert tag_safe_names(once) == once


def test_a_stored_probe_has_the_names_of_its_snapshots(tmp_path: Path) -> None:
    probe = ProbeBatch(torch.zeros(3, 3, 4, 4), names=["a", "a", "x" * 90])
    probe.save(tmp_path / "x.npz")
    assert ProbeBatch.load(tmp_path / "x.npz").names == probe.names == ("a", "a~2", "x" * MAX_NAME_BYTES)
    assert ProbeBatch.from_state_dict(probe.state_dict()).names == probe.names


def test_bfloat16_is_stored(tmp_path: Path) -> None:
    """NumPy has no such type: the same numbers are stored as float32."""
    probe = ProbeBatch(torch.randn(1, 3, 4, 4, dtype=torch.bfloat16))
    probe.save(tmp_path / "x.npz")
    assert torch.equal(ProbeBatch.load(tmp_path / "x.npz").images, probe.images.float())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"images": torch.zeros(3, 8, 8)}, "images: received"),
        ({"images": torch.zeros(1, 3, 8, 8).byte()}, "uint8"),
        ({"images": torch.zeros(1, 4, 8, 8)}, "mean: received 3 values, expected one for each of 4 channels"),
        ({"images": torch.zeros(2, 3, 8, 8), "names": ["a"]}, "names: received 1, expected one for each of 2"),
        ({"images": torch.zeros(1, 3, 8, 8), "masks": torch.zeros(1, 8, 8)}, "masks: received"),
        ({"images": torch.zeros(1, 3, 8, 8), "masks": torch.zeros(1, 1, 8, 9)}, "masks: received"),
    ],
)
def test_wrong_arguments(arguments: dict, text: str) -> None:
    with pytest.raises(ProbeError, match=text):
        ProbeBatch(**arguments)
