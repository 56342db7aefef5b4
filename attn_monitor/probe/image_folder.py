"""Read photographs and masks of their objects from files and folders, resized to one size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from attn_monitor.errors import ProbeError
from attn_monitor.probe.dicom_files import dicom_series, is_dicom
from attn_monitor.probe.file_numbers import PHOTOGRAPHS, SUFFIXES
from attn_monitor.probe.image_files import is_image, read_image, stem_of

Item = TypeVar("Item")
Size = int | tuple[int, ...]
"""Side of a square, or (height, width), in pixels; of volumes (depth, height, width)."""

IGNORED_LABEL = 255  # border in the VOC palette


@dataclass(frozen=True)
class Photographs:
    """Images of one size.

    Args:
        pixels: RGB or grey, uint8 (B, channels, H, W); or float32 (B, channels, H, W) or (B, channels, D, H, W).
        masks: Ground-truth objects, bool (B, objects, H, W), or None.
        names: Names of the files without suffix.
        to_1: Whether floats are from 0 to 1 by the files' format; others are as they are in the files.
    """

    pixels: Tensor
    masks: Tensor | None
    names: list[str]
    to_1: bool = True


def read_images(
    path: str | os.PathLike[str],
    *,
    size: Size,
    num_images: int,
    masks: str | os.PathLike[str] | None = None,
    channels: int | None = None,
    large: bool = False,
    onerror: Callable[[str], None] | None = None,
) -> Photographs:
    """Read one image, evenly spaced images of a folder, or of a folder of class folders one of each class in turn.

    Args:
        path: An image, a folder of images, or a folder of folders of images.
        size: Size of the images; each is resized to cover it and cropped at the centre. Three numbers read volumes.
        num_images: Largest number of images, at least 1.
        masks: Folder of PNGs with the images' names: binary, or one value per object (255 is ignored).
        channels: How many channels the model takes; None takes three of photographs, and those of other files.
        large: Whether to read images with more pixels than Pillow's limit.
        onerror: Called with the name and the error of each unreadable image among readable ones, which are read; by
            default one unreadable image is an error.

    Raises:
        ProbeError: A folder, image or mask is missing or unreadable.
    """
    check_count(num_images)
    reader = _Reader(check_size(size), channels, large, onerror)
    if Path(path).is_file():
        return _read([[Path(path)]], "image", reader, masks)
    return _read(_choose_files(Path(path), num_images, reader), f"probe folder {path}", reader, masks)


def own_size(path: str | os.PathLike[str], *, volume: bool) -> tuple[int, ...]:
    """Return the size in pixels of an image, or of the first in a folder, as it is in the file.

    Raises:
        ProbeError: It is not there, or no volume. Libraries raise nearly anything else.
    """
    reader = _Reader((1,) * (2 + volume), None, large=True)
    files = [Path(path)] if Path(path).is_file() else _choose_files(Path(path), 1, reader)[0]
    pixels = read_image(files, channels=None, volume=volume, large=True).pixels
    return pixels.size[::-1] if isinstance(pixels, Image.Image) else tuple(pixels.shape[1:])


def read_files(files: Sequence[Path], source: str, size: Size, channels: int) -> Photographs:
    """Read photographs, resized and cropped at the centre; the error names every unreadable file."""
    return _read([[file] for file in files], source, _Reader(check_size(size), channels), None)


def images_in(folder: Path) -> list[Path]:
    """List the photographs in a folder, by name."""
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in PHOTOGRAPHS and f.is_file())


@dataclass(frozen=True)
class _Reader:
    size: tuple[int, ...]  # (height, width), or (depth, height, width) of volumes
    channels: int | None
    large: bool = False
    onerror: Callable[[str], None] | None = None

    @property
    def volume(self) -> bool:
        return len(self.size) == 3


def check_size(size: Size) -> tuple[int, ...]:
    """Return (height, width), or the three numbers of a volume; `ProbeError` if one is below 1."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if min(sides) < 1:
        raise ProbeError(
            f"size={size}: expected pixels of at least 1, one number, [height, width] or [depth, height, width]"
        )
    return sides


def check_count(num_images: int) -> int:
    """Return ``num_images``; `ProbeError` if it is below 1."""
    if num_images < 1:
        raise ProbeError(f"num_images={num_images}: expected at least 1")
    return num_images


def _read(
    images: Sequence[Sequence[Path]], source: str, reader: _Reader, masks: str | os.PathLike[str] | None
) -> Photographs:
    """Read the images, resized and cropped at the centre; the error names every unreadable file."""
    pixels, names, files, unreadable, to_1 = list[Tensor](), list[str](), list[Path](), list[str](), list[bool]()
    class_folders = len({image[0].parent for image in images}) > 1
    for image in images:
        file = image[0]
        try:
            read = read_image(image, channels=reader.channels, volume=reader.volume, large=reader.large)
            pixels.append(_fitted(read.pixels, reader.size))
        except ProbeError as error:
            unreadable.append(f"{file.name}: {error}")
        except Exception as error:  # Pillow's plugins raise nearly anything on broken files
            unreadable.append(f"{file.name} ({type(error).__name__}: {error})")
        else:
            to_1.append(read.to_1)
            files.append(file)
            parts = (file.parent.name if class_folders else "", stem_of(file), read.part)
            names.append("-".join(part for part in parts if part))
    if unreadable and (reader.onerror is None or not files):
        raise ProbeError(f"{source}: cannot read {'; '.join(unreadable)}. Remove or replace these files")
    for text in unreadable:
        assert reader.onerror is not None
        reader.onerror(text)
    channels = sorted({len(image) for image in pixels})
    if len(channels) > 1:
        raise ProbeError(
            f"{source}: some files hold {channels[0]} channels, and others {channels[-1]}; expected one number"
        )
    if len(set(to_1)) > 1:
        raise ProbeError(
            f"{source}: {files[to_1.index(True)].name} holds values from 0 to 1 by its format, and "
            f"{files[to_1.index(False)].name} numbers in a unit of its own; expected one kind. Put each kind into a "
            "folder of its own, or save all as bytes, or all as numbers"
        )
    if len({image.dtype for image in pixels}) > 1:
        pixels = [image / 255 if image.dtype == torch.uint8 else image for image in pixels]
    if masks is not None and reader.volume:
        raise ProbeError(
            f"masks={os.fspath(masks)!r}: images are volumes, for which masks are not read. Leave masks out"
        )
    found = None if masks is None else _read_masks(Path(masks), files, (reader.size[0], reader.size[1]))
    return Photographs(torch.stack(pixels), found, names, all(to_1))


def _fitted(pixels: Image.Image | Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize an image to cover (height, width) and crop it at the centre; resize a volume's depth."""
    if isinstance(pixels, Image.Image):
        array = np.array(_resize_and_crop(pixels, (size[0], size[1]), Image.Resampling.BICUBIC))
        return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
    have, want = pixels.shape[-2:], size[-2:]
    scale = max(w / h for h, w in zip(have, want, strict=True))
    larger = [max(w, round(h * scale)) for h, w in zip(have, want, strict=True)]
    slices = pixels.reshape(1, -1, *have)
    slices = functional.interpolate(slices, larger, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((h - w) // 2 for h, w in zip(larger, want, strict=True))
    slices = slices[..., top : top + want[0], left : left + want[1]]
    if len(size) == 3:
        lines = slices.reshape(len(pixels), -1, want[0] * want[1]).transpose(1, 2)
        lines = functional.interpolate(lines, size[0], mode="linear", align_corners=False)
        slices = lines.transpose(1, 2)
    low, high = pixels.aminmax()
    return slices.reshape(len(pixels), *size).clamp(low, high)  # bicubic overshoots


def _choose_files(folder: Path, count: int, reader: _Reader) -> list[list[Path]]:
    if not folder.is_dir():
        raise ProbeError(f"images {folder}: does not exist; expected an image or a folder of images")
    images = _images_in(folder, reader)
    if images:
        return _evenly_spaced(images, count)
    classes = [images for f in sorted(folder.iterdir()) if f.is_dir() and (images := _images_in(f, reader))]
    if not classes:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise ProbeError(f"probe folder {folder}: holds no images ({suffixes})")
    ranked = sorted(
        (rank, image) for images in _evenly_spaced(classes, count) for rank, image in enumerate(images[:count])
    )
    return [image for _, image in ranked[:count]]


def _images_in(folder: Path, reader: _Reader) -> list[list[Path]]:
    """Return the images of a folder, each as its file, and volumes of a DICOM series as the files of their slices."""
    files = sorted(f for f in folder.iterdir() if is_image(f) and f.is_file())
    if not reader.volume:
        return [[f] for f in files]
    slices = [f for f in files if is_dicom(f)]
    return [[f] for f in files if not is_dicom(f)] + (dicom_series(slices) if slices else [])


def _evenly_spaced(items: list[Item], count: int) -> list[Item]:
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def _resize_and_crop(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return ImageOps.fit(image, (size[1], size[0]), method=resample)


def _read_masks(folder: Path, files: list[Path], size: tuple[int, int]) -> Tensor:
    """Read masks, bool (B, objects, H, W), resized and cropped like their images."""
    if not folder.is_dir():
        raise ProbeError(f"masks folder {folder} does not exist; expected a folder of PNGs")
    missing = [f"{stem_of(f)}.png" for f in files if not (folder / f"{stem_of(f)}.png").is_file()]
    if missing:
        raise ProbeError(f"masks folder {folder}: no {', '.join(missing)}; expected a PNG named like each probe image")
    objects, unreadable = [], []
    for file in files:
        path = folder / f"{stem_of(file)}.png"
        try:
            objects.append(_read_objects(path, size))
        except Exception as error:  # as for images
            unreadable.append(f"{path.name} ({type(error).__name__}: {error})")
    if unreadable:
        raise ProbeError(
            f"masks folder {folder}: cannot read {'; '.join(unreadable)}; expected PNGs, binary or one value per "
            "object. Replace these files"
        )
    most = max(map(len, objects))
    return torch.stack(
        [torch.cat([o, torch.zeros(most - len(o), *size, dtype=torch.bool, device="cpu")]) for o in objects]
    )


def _read_objects(file: Path, size: tuple[int, int]) -> Tensor:
    """Read the objects of a mask, bool (objects, H, W): one for each value but 0."""
    with Image.open(file) as opened:
        mode = opened.mode
        indexed = opened if mode in ("P", "L", "1") else opened.convert("L")
        labels = torch.from_numpy(
            np.asarray(_resize_and_crop(indexed, size, Image.Resampling.NEAREST)).astype(np.int64)
        )
    values = [value for value in labels.unique().tolist() if value != 0]
    if len(values) > 1 or mode == "P":
        values = [value for value in values if value != IGNORED_LABEL]  # a lone 255 in a grey mask means "object"
    return (
        torch.stack([labels == value for value in values])
        if values
        else torch.zeros(0, *size, dtype=torch.bool, device="cpu")
    )
