"""Read photographs and masks of their objects from files and folders, resized to one size."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from attn_monitor.errors import ProbeError

Item = TypeVar("Item")
Size = int | tuple[int, int]
"""Side of a square, or (height, width), in pixels."""

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
IGNORED_LABEL = 255  # border in the VOC palette


@dataclass(frozen=True)
class Photographs:
    """Images of one size.

    Args:
        pixels: RGB, uint8 (B, 3, H, W).
        masks: Ground-truth objects, bool (B, objects, H, W), or None.
        names: Names of the files without suffix.
    """

    pixels: Tensor
    masks: Tensor | None
    names: list[str]


def read_images(
    path: str | os.PathLike[str], *, size: Size, num_images: int, masks: str | os.PathLike[str] | None = None
) -> Photographs:
    """Read one image, evenly spaced images of a folder, or of a folder of class folders one of each class in turn.

    Args:
        path: An image, a folder of images, or a folder of folders of images.
        size: Size of the images; each is resized to cover it and cropped at the centre.
        num_images: Largest number of images, at least 1.
        masks: Folder of PNGs with the images' names: binary, or one value per object (255 is ignored).

    Raises:
        ProbeError: A folder, image or mask is missing or unreadable.
    """
    check_count(num_images)
    if Path(path).is_file():
        return read_files([Path(path)], "image", size, masks)
    return read_files(_choose_files(Path(path), num_images), f"probe folder {path}", size, masks)


def check_size(size: Size) -> tuple[int, int]:
    """Return (height, width); `ProbeError` if one is below 1."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ProbeError(f"size={size}: expected pixels of at least 1, one number or [height, width]")
    return height, width


def check_count(num_images: int) -> int:
    """Return ``num_images``; `ProbeError` if it is below 1."""
    if num_images < 1:
        raise ProbeError(f"num_images={num_images}: expected at least 1")
    return num_images


def read_files(files: list[Path], source: str, size: Size, masks: str | os.PathLike[str] | None) -> Photographs:
    """Read the files, resized and cropped at the centre; the error names every unreadable file."""
    height, width = check_size(size)
    pixels, unreadable = [], []
    for file in files:
        try:
            photograph = _resize_and_crop(open_rgb(file), (height, width), Image.Resampling.BICUBIC)
            pixels.append(torch.from_numpy(np.array(photograph)).permute(2, 0, 1))
        except Exception as error:  # Pillow's plugins raise nearly anything on broken files
            unreadable.append(f"{file.name} ({type(error).__name__}: {error})")
    if unreadable:
        raise ProbeError(f"{source}: cannot read {'; '.join(unreadable)}. Remove or replace these files")
    class_folders = len({file.parent for file in files}) > 1
    names = [f"{file.parent.name}-{file.stem}" if class_folders else file.stem for file in files]
    return Photographs(
        torch.stack(pixels), None if masks is None else _read_masks(Path(masks), files, (height, width)), names
    )


def _choose_files(folder: Path, count: int) -> list[Path]:
    if not folder.is_dir():
        raise ProbeError(f"images {folder}: does not exist; expected an image or a folder of images")
    files = images_in(folder)
    if files:
        return _evenly_spaced(files, count)
    classes = [images for f in sorted(folder.iterdir()) if f.is_dir() and (images := images_in(f))]
    if not classes:
        raise ProbeError(f"probe folder {folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    ranked = sorted(
        (rank, file) for images in _evenly_spaced(classes, count) for rank, file in enumerate(images[:count])
    )
    return [file for _, file in ranked[:count]]


def images_in(folder: Path) -> list[Path]:
    """List the images in a folder, by name."""
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())


def _evenly_spaced(items: list[Item], count: int) -> list[Item]:
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def open_rgb(file: Path) -> Image.Image:
    """Read the first frame as upright 8-bit RGB, with transparency over white."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                values = np.asarray(image, dtype=np.float64)
                image = Image.fromarray((values / max(values.max(), 1) * 255).astype(np.uint8))
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return image.convert("RGB")


def _resize_and_crop(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return ImageOps.fit(image, (size[1], size[0]), method=resample)


def _read_masks(folder: Path, files: list[Path], size: tuple[int, int]) -> Tensor:
    """Read masks, bool (B, objects, H, W), resized and cropped like their images."""
    if not folder.is_dir():
        raise ProbeError(f"masks folder {folder} does not exist; expected a folder of PNGs")
    missing = [f"{f.stem}.png" for f in files if not (folder / f"{f.stem}.png").is_file()]
    if missing:
        raise ProbeError(f"masks folder {folder}: no {', '.join(missing)}; expected a PNG named like each probe image")
    objects, unreadable = [], []
    for file in files:
        path = folder / f"{file.stem}.png"
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
