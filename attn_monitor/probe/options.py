"""`ProbeOptions`: which images to watch, and how to normalise and show them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from attn_monitor.errors import ArgumentError
from attn_monitor.image_axes import likely_axes, parse_axes
from attn_monitor.probe.normalisation import IMAGENET_MEAN, IMAGENET_STD, infer_statistics
from attn_monitor.probe.probe_batch import ProbeBatch

NUM_IMAGES, IMAGE_SIZE = 8, 224  # defaults; the size is in pixels

# Not Dataset[Any], of which jsonargparse 4.42 to 4.50 can make no option.
Images = str | os.PathLike[str] | Tensor | ProbeBatch | Dataset | Iterable[Any]  # type: ignore[type-arg]


@dataclass(frozen=True, eq=False)
class ProbeOptions:
    """Which images to watch, and the statistics by which they are normalised.

    Args:
        images: a folder or one image; a tensor (images, channels, H, W), normalised for the model; a `ProbeBatch`; or,
            for `Watch` alone, a data set or its loader. None takes images of the run's own data.
        num_images: how many images to take from a folder or from data; None is 8.
        image_size: size of a folder's images in pixels, one number or (height, width); (depth, height, width) reads
            volumes. None is 224, or where a model refuses that, the size that it takes.
        masks: folder of ground-truth masks for a folder of images, as `ProbeBatch.from_folder` reads it. They are
            outlined in the panels, and Jaccard curves are logged.
        mean: one number a channel, by which images are normalised. None is ImageNet's for a folder; for a tensor and
            for data it is inferred.
        std: one positive number a channel, given together with ``mean``.
        axes: a letter for each dimension of an image, "c" for channels, such as "tchw" for clips; None asks the model.
        bands: which channels pictures show, one in grey or three in red, green and blue, counted from 0. None is the
            first three, or the first, and pictures say so.
        large_images: whether to read a folder's images of more than Pillow's limit of 89 million pixels.

    Raises:
        ArgumentError: A value is invalid, or could have no effect.

    Example:
        >>> ProbeOptions("photos", image_size=96).count
        8
        >>> ProbeOptions(masks="masks")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        attn_monitor.errors.ArgumentError: masks='masks': probe is None, expected the folder of images ...
    """

    images: Images | None = None
    num_images: int | None = None
    image_size: int | tuple[int, ...] | None = None
    masks: str | os.PathLike[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    axes: str | None = None
    bands: Sequence[int] | None = None
    large_images: bool = False

    def __post_init__(self) -> None:
        images, size = self.images, self.image_size
        received = "None" if images is None else f"a {type(images).__name__}"
        is_folder = isinstance(images, (str, os.PathLike))
        if not (images is None or is_folder or isinstance(images, (Tensor, ProbeBatch)) or is_data(images)):
            raise ArgumentError(
                f"probe: received {received}, expected a folder, a tensor (images, channels, H, W), a ProbeBatch, a "
                "data set or its loader (for Watch), or None to take images of the run's own data"
            )
        if self.masks is not None and not isinstance(self.masks, (str, os.PathLike)):
            raise ArgumentError(f"masks: received a {type(self.masks).__name__}, expected a folder of masks, or None")
        if self.masks is not None and not is_folder:
            raise ArgumentError(
                f"masks={os.fspath(self.masks)!r}: probe is {received}, expected the folder of images that the masks "
                "are for; a ProbeBatch takes masks of its own"
            )
        if size is not None and not is_folder:
            raise ArgumentError(
                f"image_size={size!r}: probe is {received}, whose images have a size already; expected a folder of "
                "images. Leave image_size out"
            )
        if self.num_images is not None and isinstance(images, (Tensor, ProbeBatch)):
            raise ArgumentError(
                f"num_images={self.num_images!r}: probe is {received}, all of which is shown; expected a folder, or "
                "None. Leave num_images out, and pass a part of the images, such as probe[:4] of a tensor"
            )
        if self.num_images is not None and not _is_count(self.num_images):
            raise ArgumentError(f"num_images={self.num_images!r}: expected a whole number of at least 1")
        pair = size if isinstance(size, (list, tuple)) else (size, size)
        if size is not None and (len(pair) not in (2, 3) or not all(map(_is_count, pair))):
            raise ArgumentError(
                f"image_size={size!r}: expected a number of pixels of at least 1, (height, width), or of volumes "
                "(depth, height, width)"
            )
        if self.large_images and not is_folder:
            raise ArgumentError(f"large_images=True: probe is {received}, expected a folder of images. Leave it out")
        if self.bands is not None and isinstance(images, ProbeBatch):
            raise ArgumentError(f"bands={self.bands!r}: probe is a ProbeBatch, which takes bands of its own")
        if self.axes is not None and not (isinstance(self.axes, str) and self.axes.isalpha()):
            raise ArgumentError(f'axes={self.axes!r}: expected a letter for each dimension of an image, such as "tchw"')
        bands = self.bands
        whole = isinstance(bands, (list, tuple)) and all(type(b) is int and b >= 0 for b in bands)
        if bands is not None and not (whole and len(bands) in (1, 3)):
            raise ArgumentError(f"bands={self.bands!r}: expected one channel, or three, counted from 0")
        self._check_statistics()

    def _check_statistics(self) -> None:
        mean, std, text = self.mean, self.std, f"mean={self.mean!r}, std={self.std!r}"
        if mean is None and std is None:
            return
        if mean is None or std is None or len(mean) != len(std) or not len(mean) or not all(value > 0 for value in std):
            raise ArgumentError(f"{text}: expected both, one number a channel, and no std of 0")
        if isinstance(self.images, ProbeBatch):
            raise ArgumentError(f"{text}: probe is a ProbeBatch, which takes mean and std of its own")

    @classmethod
    def of(cls, probe: ProbeOptions | Images | None, **others: Any) -> ProbeOptions:
        """Return images as options; ``others``, unless they are None, replace values of these."""
        given = {name: value for name, value in others.items() if value is not None}
        return replace(probe, **given) if isinstance(probe, ProbeOptions) else cls(probe, **given)

    @property
    def data(self) -> Any:
        """Return the data set or loader to take images of; None without one."""
        return self.images if is_data(self.images) else None

    @property
    def are_given(self) -> bool:
        """Whether the images themselves are given, and not to be found in data."""
        return self.images is not None and self.data is None

    @property
    def count(self) -> int:
        """Return how many images to take."""
        return self.num_images or NUM_IMAGES

    @property
    def other_sizes_fit(self) -> bool:
        """Whether the images can be loaded in other sizes: they are a folder's, and no size was given."""
        return self.are_files and self.image_size is None

    @property
    def are_files(self) -> bool:
        """Whether the images are read from files, with as many channels as the model takes."""
        return isinstance(self.images, (str, os.PathLike))

    def load(self, channels: int | None = None, axes: str | None = None) -> ProbeBatch | None:
        """Load the images that were given; None if they come from data. Raises `ProbeError`.

        Args:
            channels: How many channels the model takes, for a folder; None where it is not known yet.
            axes: The order of dimensions that it takes, where ``self.axes`` does not say it.
        """
        images, mean, std = self.images, self.mean, self.std
        if isinstance(images, ProbeBatch):
            return images
        if isinstance(images, Tensor):
            if mean is None and 3 <= images.ndim <= 5 and images.is_floating_point() and images.numel():
                order = parse_axes(self.axes, images) or likely_axes(images.shape)
                found = infer_statistics(order.channels_first(images.detach().cpu()))
                mean, std, source = found.mean, found.std, str(found)
            else:  # it raises for other tensors
                mean, std, source = mean or IMAGENET_MEAN, std or IMAGENET_STD, ""
            return ProbeBatch(images, mean=mean, std=std, source=source, axes=self.axes, bands=self.bands)
        if not isinstance(images, (str, os.PathLike)):
            return None
        return ProbeBatch.from_folder(
            images,
            size=self.image_size or IMAGE_SIZE,
            num_images=self.count,
            masks=self.masks,
            mean=mean,
            std=std,
            channels=channels,
            bands=self.bands,
            large_images=self.large_images,
            axes=self.axes or axes,
        )

    def with_statistics(self, probe: ProbeBatch) -> ProbeBatch:
        """Apply ``mean``, ``std``, ``axes`` and ``bands``, if any, to images that were found in data."""
        if self.axes is not None:
            probe = probe.with_axes(self.axes)
        if self.bands is not None and tuple(self.bands) != probe.bands:
            probe = probe.with_bands(self.bands)
        return probe if self.mean is None or self.std is None else probe.with_statistics(self.mean, self.std)


def is_data(images: object) -> bool:
    """Whether an object acts as a data set or a loader: it has samples with indices, or yields batches."""
    if isinstance(images, (str, bytes, os.PathLike, Tensor, ProbeBatch, Mapping, nn.Module, type)):
        return False
    return hasattr(images, "__iter__") or (hasattr(images, "__len__") and hasattr(images, "__getitem__"))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
