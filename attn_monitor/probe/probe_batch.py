"""`ProbeBatch`: the fixed images on which attention is recorded, and how to show them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_monitor.errors import ProbeError
from attn_monitor.image_axes import SHAPES, axes_with, in_order, named_axes, parse_axes
from attn_monitor.probe.bands import shown_bands
from attn_monitor.probe.image_folder import Size, read_images
from attn_monitor.probe.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_statistics, infer_statistics, normalise
from attn_monitor.probe.stored_probe import read_probe, stored_tensors
from attn_monitor.record.file_names import tag_safe_names
from attn_monitor.record.header_fields import Fields
from attn_monitor.record.npz import open_npz, tensor_reader, write_npz


class ProbeBatch:
    """Images as the model takes them, and how to show them.

    Args:
        images: Normalised images, floats (B, C, H, W); or clips, volumes and spectrograms of three to five dimensions,
            in the order that the model takes.
        mean: One number per channel; ``pixels = images · std + mean`` is in 0 to 1.
        std: One number per channel.
        masks: Ground-truth objects, bool (B, objects, H, W), or of as many axes as the images have, all False where an
            image has fewer objects.
        names: A name for each image; by default "image0", "image1" and so on.
        caption: Caption of the images in panels.
        source: Origin of mean and std, for messages.
        axes: A letter for each dimension of an image, "c" for channels, such as "tchw"; see `record_attention`.
        bands: Channels that are shown: one in grey, or three in red, green and blue. None takes the first.

    Raises:
        ProbeError: A shape or type does not fit.

    Example:
        >>> probe = ProbeBatch(torch.zeros(2, 3, 32, 32), names=["cat", "dog"])
        >>> len(probe), probe.names, probe.pixels.shape
        (2, ('cat', 'dog'), (2, 32, 32, 3))
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
        axes: str | None = None,
        bands: Sequence[int] | None = None,
    ) -> None:
        one = images.ndim == 3 and axes is None and len(mean) == images.shape[0] > 1  # one image without a batch
        one = one and len(mean) not in images.shape[1:]  # as many signals as each has channels
        if one or not 3 <= images.ndim <= 5 or not images.is_floating_point() or 0 in images.shape:
            raise ProbeError(
                f"images: received {tuple(images.shape)} {images.dtype}, expected floats of a shape such as (images, "
                f"channels, H, W): {SHAPES}{'. Pass images[None] for one image' * one}"
            )
        self.axes, self.image_axes = axes, parse_axes(axes, images) or axes_with(images, len(mean))
        check_statistics(mean, std, self.image_axes.channels_first(images).shape[1])
        if names is not None and len(names) != len(images):
            raise ProbeError(f"names: received {len(names)}, expected one for each of {len(images)} images")
        size = self.image_axes.channels_first(images).shape[2:]
        if masks is not None and (
            masks.ndim != 2 + len(size) or (len(masks), *masks.shape[2:]) != (len(images), *size)
        ):
            raise ProbeError(
                f"masks: received {tuple(masks.shape)}, expected (images, objects, H, W) of the images' size"
            )
        self.images = images.detach().cpu()
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.bands = shown_bands(bands, len(self.mean))
        self.caption = caption
        self.source = source
        self.masks = masks.bool().cpu() if masks is not None and masks.any() else None
        self.names = tag_safe_names(names if names is not None else [f"image{i}" for i in range(len(images))])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels_first(self) -> Tensor:
        """The images as (B, C, *size), with one channel where they have none."""
        return self.image_axes.channels_first(self.images)

    @property
    def shown_caption(self) -> str:
        """The caption of `pixels`, with the bands that they show where these do not go without saying."""
        count, images = len(self.mean), self.channels_first
        caption = self.caption
        if images.ndim == 5:
            word = {"t": "frames", "d": "slices"}.get(self.image_axes.spatial[0], self.image_axes.spatial[0])
            caption += f", mean of {images.shape[2]} {word}"
        if count in (1, 3) and self.bands == shown_bands(None, count):
            return caption
        word = "band" if len(self.bands) == 1 else "bands"
        return f"{caption}, {word} {', '.join(map(str, self.bands))} of {count}"

    @property
    def pixels(self) -> np.ndarray[Any, Any]:
        """Denormalised images, uint8 (B, H, W, 3), of the channels ``bands``; one of them as grey.

        Of clips and volumes it is the mean over frames or slices.
        """
        images = self.channels_first.float()
        if images.ndim != 4:
            images = images.unsqueeze(2) if images.ndim == 3 else images.mean(2)
        return self._shown(images)

    @property
    def frames(self) -> np.ndarray[Any, Any]:
        """Every frame of clips, or slice of volumes, as `pixels`: uint8 (B, frames, H, W, 3)."""
        return np.stack([frames for i in range(len(self)) if (frames := self.frames_of(i)) is not None])

    def frames_of(self, image: int) -> np.ndarray[Any, Any] | None:
        """Return the frames or slices of one image, uint8 (frames, H, W, 3); None for images of fewer axes."""
        images = self.channels_first
        return self._shown(images[image].float().movedim(1, 0)) if images.ndim == 5 else None

    def _shown(self, images: Tensor) -> np.ndarray[Any, Any]:
        """Denormalise (n, C, H, W), uint8 (n, H, W, 3)."""
        mean, std = (torch.tensor(v, device="cpu").view(1, -1, 1, 1) for v in (self.mean, self.std))
        shown = (images * std + mean).clamp(0, 1).nan_to_num()[:, list(self.bands)].expand(-1, 3, -1, -1)
        pixels: np.ndarray[Any, Any] = (shown * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return pixels

    @property
    def plane_masks(self) -> Tensor:
        """The masks for `pixels`, bool (B, objects, H, W): where any frame or slice has the object."""
        size = self.pixels.shape[1:3]
        masks = torch.zeros(len(self), 0, *size, dtype=torch.bool, device="cpu") if self.masks is None else self.masks
        return masks.any(2) if masks.ndim == 5 else masks.reshape(*masks.shape[:2], *size)

    def has_same_images_as(self, other: ProbeBatch) -> bool:
        """Return True if the images are bit-identical."""
        return self.images.shape == other.images.shape and torch.equal(self.images, other.images)

    def with_bands(self, bands: Sequence[int]) -> ProbeBatch:
        """Return the same images, of which other channels are shown."""
        return self._with(bands=bands)

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> ProbeBatch:
        """Return the same images with another mean and std."""
        return self._with(mean=mean, std=std, source="")

    def with_axes(self, axes: str) -> ProbeBatch:
        """Return the same images, of which the dimensions behind the batch are named, as in ``"tchw"``.

        Where that makes other dimensions the channels, mean and std are inferred again, and the default bands shown.
        """
        named = parse_axes(axes, self.images)
        assert named is not None
        if named.channel == self.image_axes.channel:
            return self._with(axes=axes)
        found = infer_statistics(named.channels_first(self.images))
        return self._with(axes=axes, mean=found.mean, std=found.std, source=str(found), bands=None)

    def _with(self, **changes: Any) -> ProbeBatch:
        names = ("images", "mean", "std", "masks", "names", "caption", "source", "axes", "bands")
        return ProbeBatch(**{**{name: getattr(self, name) for name in names}, **changes})

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        *,
        size: Size = 224,
        num_images: int = 8,
        masks: str | os.PathLike[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int | None = None,
        bands: Sequence[int] | None = None,
        large_images: bool = False,
        axes: str | None = None,
        onerror: Callable[[str], None] | None = None,
    ) -> ProbeBatch:
        """Read one image or those of a folder, resized to cover ``size`` and cropped at the centre.

        Photographs are RGB, or grey for models of one channel. Other channels, measured values and volumes are read
        from multi-page and multi-band TIFF, `.npy`, NIfTI and DICOM, with the extra "formats". Their numbers enter the
        model as they are, but bytes and 16-bit PNG as 0 to 1.

        Args:
            path: An image, a folder of images, or of class folders.
            size: A square's side or (height, width), in pixels; (depth, height, width) reads volumes.
            num_images: Largest number of images; more are thinned evenly in the order of their names.
            masks: Folder of PNGs with the images' names: binary, or one value per object (255 is ignored), all 0 for an
                image without ground truth.
            mean: One number per channel, to normalise with; by default ImageNet's for values from 0 to 1, else 0.
            std: One number per channel, to normalise with; by default ImageNet's for values from 0 to 1, else 1.
            channels: How many channels the model takes; None takes three of photographs, and those of other files.
            bands: Channels that are shown, one or three; None takes the first.
            large_images: Whether to read images of more than Pillow's limit of 89 million pixels.
            axes: The order of an image's dimensions that the model takes, such as "tchw" for frames before channels, or
                "tf" for spectrograms without channels; None puts channels first.
            onerror: Called with the name and the error of each unreadable image, which is left out as long as others
                can be read; by default one unreadable image is an error.

        Raises:
            ProbeError: A folder, image or mask is missing or unreadable; the message names every unreadable file.
        """
        options: dict[str, Any] = {"masks": masks, "channels": channels, "large": large_images, "onerror": onerror}
        read = read_images(path, size=size, num_images=num_images, **options)
        count = read.pixels.shape[1]
        if mean is None or std is None:
            grey = tuple(sum(values) / 3 for values in (IMAGENET_MEAN, IMAGENET_STD))
            mean, std = (IMAGENET_MEAN, IMAGENET_STD) if count == 3 else ((grey[0],) * count, (grey[1],) * count)
            mean, std = (mean, std) if read.to_1 else ((0.0,) * count, (1.0,) * count)
        check_statistics(mean, std, count)
        source = ""
        images = normalise(read.pixels, mean, std)
        if not read.to_1:
            found = infer_statistics(images)
            mean, std, source = found.mean, found.std, str(found)
        if axes is None:
            axes = "".join(named_axes(images.shape[1:], 0).names)
        images = in_order(images, axes)
        settings: dict[str, Any] = {"source": source, "bands": bands, "axes": None if axes == "chw" else axes}
        return cls(images, mean=mean, std=std, masks=read.masks, names=read.names, **settings)

    @property
    def stored_bytes(self) -> int:
        """Return how many bytes `save` writes, about."""
        return sum(tensor.nbytes for tensor in stored_tensors(self).values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the probe to an `.npz` file, in 8 bits if that is lossless."""
        header: dict[str, Any] = {"names": list(self.names), "mean": self.mean, "std": self.std}
        header.update(caption=self.caption, source=self.source, bands=list(self.bands), **self._axes_fact())
        arrays = {k: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for k, v in stored_tensors(self).items()}
        write_npz(Path(path), header, arrays)  # NumPy has no bfloat16

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProbeBatch:
        """Read a file that `save` wrote; `ArchiveError` if it is no valid probe."""
        with open_npz(Path(path)) as file:
            return cls(**read_probe(file.header, file.tensor))

    def state_dict(self) -> dict[str, Any]:
        """Return the probe as tensors and plain values, loadable with ``weights_only=True``."""
        return {
            "tensors": stored_tensors(self),
            "names": list(self.names),
            "mean": list(self.mean),
            "std": list(self.std),
            "caption": self.caption,
            "source": self.source,
            **self._axes_fact(),
            "bands": list(self.bands),
        }

    def _axes_fact(self) -> dict[str, str]:
        """Return the stored names of the axes, none for images (B, C, H, W)."""
        names = self.axes or ("" if self.images.ndim == 4 else "".join(self.image_axes.names))
        return {"axes": names} if names else {}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ProbeBatch:
        """Restore a probe from `state_dict`, bit by bit; `ArchiveError` if it is no valid probe."""
        stored = Fields(state, "state of a probe")
        return cls(**read_probe(stored, tensor_reader(stored.mapping("tensors"))))
