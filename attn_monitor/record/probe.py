"""`ProbeBatch`: the fixed images that attention is watched on, and how to show them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from attn_monitor.errors import ArchiveError, ProbeError
from attn_monitor.record.fields import Fields
from attn_monitor.record.file_names import LONGEST, cut
from attn_monitor.record.normalisation import find_statistics
from attn_monitor.record.npz import Take, open_npz, tensors_in, write_npz

Item = TypeVar("Item")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
IGNORE = 255  # the VOC palette's border


class ProbeBatch:
    """Images as the model takes them, (B, C, H, W) floats, with the means to show them again.

    ``mean`` and ``std`` (one number per channel) undo the normalisation: pixels = images · std + mean, in 0…1.
    ``caption`` says in panels what is shown of them, ``source`` where mean and std are from.
    ``masks`` are ground-truth objects, bool (B, objects, H, W), all False where an image has fewer objects; without
    any object at all they are None.
    """

    def __init__(
        self,
        images: Tensor,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        masks: Tensor | None = None,
        names: Sequence[str] | None = None,
        caption: str = "original",
        source: str = "",
    ) -> None:
        if images.ndim != 4 or not images.is_floating_point() or 0 in images.shape:
            raise ProbeError(
                f"images: received {tuple(images.shape)} {images.dtype}, expected floats (images, channels, H, W)"
            )
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != images.shape[1]:
                raise ProbeError(f"{name}: received {len(values)} values for images of {images.shape[1]} channels")
        if names is not None and len(names) != len(images):
            raise ProbeError(f"names: received {len(names)} for {len(images)} images")
        if masks is not None and (
            masks.ndim != 4 or (len(masks), *masks.shape[2:]) != (len(images), *images.shape[2:])
        ):
            raise ProbeError(
                f"masks: received {tuple(masks.shape)}, expected (images, objects, H, W) of the images' size"
            )
        self.images = images.detach().cpu()
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.caption, self.source = caption, source
        self.masks = masks.bool().cpu() if masks is not None and masks.any() else None
        self.names = tag_names(names if names is not None else [f"image{i}" for i in range(len(images))])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pixels(self) -> np.ndarray[Any, Any]:
        """For display, uint8 (B, H, W, 3); one channel becomes grey, of more than three the first three are kept."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        shown = (self.images.float() * std + mean).clamp(0, 1).nan_to_num()
        shown = shown[:, :3] if shown.shape[1] >= 3 else shown[:, :1].expand(-1, 3, -1, -1)
        pixels: np.ndarray[Any, Any] = (shown * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return pixels

    def shows_the_same_as(self, other: ProbeBatch) -> bool:
        """Whether the images are equal to the bit."""
        return self.images.shape == other.images.shape and torch.equal(self.images, other.images)

    @classmethod
    def of(
        cls,
        probe: str | os.PathLike[str] | Tensor | ProbeBatch,
        *,
        size: int | tuple[int, int] = 224,
        num_images: int = 8,
        masks: str | os.PathLike[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> ProbeBatch:
        """What people have: a folder, with its masks, a tensor of normalised images, or a probe as it is.

        Without ``mean`` and ``std``, those of a tensor are told from its values, and a folder is normalised by
        ImageNet's.
        """
        if isinstance(probe, ProbeBatch):
            return probe
        if isinstance(probe, Tensor):
            if mean is None or std is None:
                if probe.ndim != 4 or not probe.is_floating_point() or not probe.numel():
                    return cls(probe)  # raises what is wrong with it
                found = find_statistics(probe.detach().cpu())
                return cls(probe, mean=found.mean, std=found.std, source=str(found))
            return cls(probe, mean=mean, std=std)
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
        return cls.from_folder(probe, size=size, num_images=num_images, masks=masks, mean=mean, std=std)

    def shown_by(self, mean: Sequence[float], std: Sequence[float]) -> ProbeBatch:
        """The same images, shown by other statistics."""
        images, masks, names = self.images, self.masks, self.names
        return ProbeBatch(images, mean=mean, std=std, masks=masks, names=names, caption=self.caption)

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        *,
        size: int | tuple[int, int] = 224,
        num_images: int = 8,
        masks: str | os.PathLike[str] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> ProbeBatch:
        """Images of a folder, resized to cover ``size`` (square, or (height, width)) and cropped at the centre.

        When there are more than ``num_images``, they are taken at even distances from the sorted list; a folder of
        class folders works too. ``masks`` is a folder of PNG masks with the images' names: binary, or one value per
        object (255 is ignored), all 0 for an image without truth. Every unreadable file is named in the error.
        """
        files = _choose_images(Path(path), num_images)
        truth = None if masks is None else Path(masks)
        return cls._from_files(files, f"probe folder {path}", size, mean, std, truth)

    @classmethod
    def from_path(
        cls,
        path: str | os.PathLike[str],
        *,
        size: int | tuple[int, int] = 224,
        num_images: int = 8,
        masks: str | os.PathLike[str] | None = None,
    ) -> ProbeBatch:
        """One image file, or a folder as `from_folder` takes it."""
        if Path(path).is_file():
            truth = None if masks is None else Path(masks)
            return cls._from_files([Path(path)], "image", size, IMAGENET_MEAN, IMAGENET_STD, truth)
        return cls.from_folder(path, size=size, num_images=num_images, masks=masks)

    @classmethod
    def _from_files(
        cls,
        files: list[Path],
        what: str,
        size: int | tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        masks: Path | None,
    ) -> ProbeBatch:
        height, width = (size, size) if isinstance(size, int) else size
        tensors, broken = [], []
        for file in files:
            try:
                tensors.append(_normalise(_fit(_open_rgb(file), (height, width), Image.Resampling.BICUBIC), mean, std))
            except Exception as error:  # Pillow's plugins raise nearly anything on broken files
                broken.append(f"{file.name} ({type(error).__name__}: {error})")
        if broken:
            raise ProbeError(f"{what}: cannot read {'; '.join(broken)}. Remove or replace these files")
        truth = None if masks is None else _read_masks(masks, files, (height, width))
        several = len({file.parent for file in files}) > 1  # class folders
        names = [f"{file.parent.name}-{file.stem}" if several else file.stem for file in files]
        return cls(torch.stack(tensors), mean=mean, std=std, masks=truth, names=names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Store for offline drawing and for resuming; 8-bit when that loses nothing."""
        header: dict[str, Any] = {"names": list(self.names), "mean": self.mean, "std": self.std}
        header.update(caption=self.caption, source=self.source)
        arrays = {k: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for k, v in self._stored().items()}
        write_npz(Path(path), header, arrays)  # NumPy has no bfloat16

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProbeBatch:
        """Read what `save` wrote; `ArchiveError` when the file is no probe, or its parts contradict each other."""
        with open_npz(Path(path)) as file:
            return cls._from_stored(file.header, file.tensor)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: tensors and plain values only, loadable with ``weights_only=True``."""
        return {
            "tensors": self._stored(),
            "names": list(self.names),
            "mean": list(self.mean),
            "std": list(self.std),
            "caption": self.caption,
            "source": self.source,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ProbeBatch:
        """The probe that `state_dict` came from, to the bit; `ArchiveError` when it is none."""
        stored = Fields(state, "state of a probe")
        return cls._from_stored(stored, tensors_in(stored.mapping("tensors")))

    def _stored(self) -> dict[str, Tensor]:
        stored = {"images": self.images}
        if self.images.shape[1] == 3:
            pixels = torch.from_numpy(self.pixels).permute(0, 3, 1, 2).contiguous()
            if torch.equal(_scale(pixels, self.mean, self.std), self.images):
                stored = {"pixels": pixels}
        return stored if self.masks is None else {**stored, "masks": self.masks}

    @classmethod
    def _from_stored(cls, header: Fields, take: Take) -> ProbeBatch:
        names, mean, std = header.names("names"), header.numbers("mean"), header.numbers("std")
        images = take("images", ("float32", "float16", "float64", "bfloat16"), (len(names), len(mean), None, None))
        if not 0 < len(mean) == len(std) or 0 in std:
            raise ArchiveError(f"mean={mean}, std={std} in the {header.where}, expected as many, and no std of 0")
        if images is None:
            pixels = take("pixels", ("uint8",), (len(names), 3, None, None))
            if pixels is None or len(mean) != 3:
                raise ArchiveError("neither 'images' nor 'pixels' is there, with a mean and std for each channel")
            images = _scale(pixels, mean, std)
        masks = take("masks", ("bool",), (len(names), None, *images.shape[2:]))
        caption, source = header.text("caption", default="original"), header.text("source", default="")
        return cls(images, mean=mean, std=std, masks=masks, names=names, caption=caption, source=source)


def tag_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names that can stand in a logger's tag and in a file name: no slashes, not too long, each one different.

    Names that this gave stay as they are, so that a stored probe has those of its snapshots.
    """
    safe: list[str] = []
    for name in names:
        short = cut(re.sub(r"[^\w .+~-]", "_", name), LONGEST).strip() or "image"
        unique, number = short, 1
        while unique in safe:
            number += 1
            unique = cut(short, LONGEST - len(f"~{number}")) + f"~{number}"
        safe.append(unique)
    return tuple(safe)


def _choose_images(folder: Path, count: int) -> list[Path]:
    """Images of a folder at even distances; of a folder of class folders, one of each class as far as they go."""
    if count < 1:
        raise ProbeError(f"num_images={count}: expected at least 1")
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ProbeError(f"probe folder {folder}: {found}; expected a folder of images")
    files = _images_in(folder)
    if files:
        return _evenly(files, count)
    classes = [images for f in sorted(folder.iterdir()) if f.is_dir() and (images := _images_in(f))]
    if not classes:
        raise ProbeError(f"probe folder {folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    ranked = sorted((rank, file) for images in _evenly(classes, count) for rank, file in enumerate(images[:count]))
    return [file for _, file in ranked[:count]]


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())


def _evenly(items: list[Item], count: int) -> list[Item]:
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def _open_rgb(file: Path) -> Image.Image:
    """Upright RGB of the first frame; transparency over white, 16 bits reduced to 8."""
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


def _fit(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return ImageOps.fit(image, (size[1], size[0]), method=resample)


def _normalise(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return _scale(pixels[None], mean, std)[0]


def _scale(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, C, H, W) to what the model takes."""
    m, s = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
    return (pixels.float() / 255 - m) / s


def _read_masks(folder: Path, files: list[Path], size: tuple[int, int]) -> Tensor:
    """bool (B, objects, H, W), each mask resized and cropped exactly as its image."""
    if not folder.is_dir():
        raise ProbeError(f"masks folder {folder} does not exist")
    missing = [f"{f.stem}.png" for f in files if not (folder / f"{f.stem}.png").is_file()]
    if missing:
        raise ProbeError(f"masks folder {folder}: no {', '.join(missing)}; expected a PNG named like each probe image")
    objects = []
    for file in files:
        with Image.open(folder / f"{file.stem}.png") as opened:
            indexed = opened if opened.mode in ("P", "L", "1") else opened.convert("L")
            labels = np.asarray(_fit(indexed, size, Image.Resampling.NEAREST)).astype(np.int64)
        values = [v for v in np.unique(labels) if v != 0]
        if len(values) > 1 or opened.mode == "P":
            values = [v for v in values if v != IGNORE]  # a lone 255 in a grey mask means "object"
        objects.append(
            torch.from_numpy(np.stack([labels == v for v in values]) if values else np.zeros((0, *size), bool))
        )
    most = max(len(o) for o in objects)
    return torch.stack([torch.cat([o, torch.zeros(most - len(o), *size, dtype=torch.bool)]) for o in objects])
