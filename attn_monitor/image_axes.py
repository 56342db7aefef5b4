"""`ImageAxes`: the names of an image's dimensions, and which of them holds the channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from attn_monitor.errors import ArgumentError

SHAPES = (
    "(batch, channels, height, width); clips (batch, channels, frames, height, width) or (batch, frames, channels, "
    "height, width); volumes (batch, channels, depth, height, width); or spectrograms (batch, frequency, time), "
    "(batch, time, frequency)"
)
"""The shapes of images that are taken, for messages."""


@dataclass(frozen=True)
class ImageAxes:
    """Name the dimensions of images behind the batch.

    Attributes:
        names: A name for each dimension, such as ("c", "h", "w").
        channel: Which of them holds the channels, None where none does.
        groups: Groups of channels that are one more axis of the image, before the others; empty where they are none.
    """

    names: tuple[str, ...]
    channel: int | None
    groups: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, axes: str) -> ImageAxes:
        """Return the axes of letters such as "tchw"."""
        return cls(tuple(axes), axes.find("c") if "c" in axes else None)

    @property
    def spatial(self) -> tuple[str, ...]:
        """Return the names of the axes without the channels."""
        of_space = tuple(name for number, name in enumerate(self.names) if number != self.channel)
        return ("c", *of_space) if self.groups else of_space

    def channels_first(self, images: Tensor) -> Tensor:
        """Return images in the model's order as (B, C, *size); C is 1 where there are no channels.

        Where groups of them are an axis, C is the size of the largest one, and others repeat their first channel.
        """
        images = images.unsqueeze(1) if self.channel is None else images.movedim(1 + self.channel, 1)
        if not self.groups:
            return images
        most = max(map(len, self.groups))
        return images[:, [[group[n] if n < len(group) else group[0] for group in self.groups] for n in range(most)]]

    def with_groups(self, groups: tuple[tuple[int, ...], ...]) -> ImageAxes:
        """Return axes in which groups that hold all channels are one more axis of the image."""
        return replace(self, groups=groups)

    def size_of(self, images: Tensor) -> tuple[int, ...]:
        """Return the number of pixels of images on each axis."""
        return tuple(self.channels_first(images).shape[2:])

    def as_given(self, images: Tensor) -> Tensor:
        """Return images (B, C, *size) in the model's order."""
        if self.groups:
            at = {channel: (n, g) for g, group in enumerate(self.groups) for n, channel in enumerate(group)}
            within, groups = zip(*(at[channel] for channel in sorted(at)), strict=True)
            images = images[:, list(within), list(groups)]
        return images.squeeze(1) if self.channel is None else images.movedim(1, 1 + self.channel)

    def __str__(self) -> str:
        return f"(batch, {', '.join(self.names)})"


def parse_axes(axes: str | None, images: Tensor) -> ImageAxes | None:
    """Return axes that were given as a name for each dimension behind the batch, such as "tchw"; None for None.

    Raises:
        ArgumentError: The names are no distinct letters, or not as many as the images have dimensions.
    """
    if axes is None:
        return None
    if not isinstance(axes, str) or len(set(axes)) != len(axes) or len(axes) != images.ndim - 1 or not axes.isalpha():
        raise ArgumentError(
            f"axes={axes!r}: images are {tuple(images.shape)}, expected one letter for each of the {images.ndim - 1} "
            'dimensions behind the batch, with "c" for channels, such as "chw", "tchw", "cdhw" or "ft"'
        )
    return ImageAxes.of(axes)


def in_order(images: Tensor, axes: str) -> Tensor:
    """Return images (B, C, *size) with the dimensions of an image in another order, such as "tchw" or "tf".

    Raises:
        ArgumentError: The letters do not fit the images.
    """
    order = ImageAxes.of(axes)
    wrong = len(order.spatial) != images.ndim - 2 or len(set(axes)) != len(axes)
    if wrong or (order.channel is None and images.shape[1] > 1):
        raise ArgumentError(
            f"axes={axes!r}: files hold {images.shape[1]} channels and {images.ndim - 2} axes, expected a letter for "
            'each axis, and "c" where there are channels, such as "chw" or "tf"; clips and volumes, such as "tchw", '
            "are read with a size of three numbers"
        )
    return order.as_given(images)


_FEW = 4  # channels of a signal without a convolution


def likely_axes(shape: Sequence[int]) -> ImageAxes:
    """Name the dimensions of images (B, …) by their sizes alone, as far as these tell: channels are the fewest.

    Args:
        shape: That of the images, batch included.
    """
    sizes = tuple(shape[1:])
    if len(sizes) == 2:  # a spectrogram has more bins of frequency than a signal has channels
        return named_axes(sizes, sizes.index(min(sizes)) if min(sizes) <= _FEW < max(sizes) else None)
    if len(sizes) == 4 and sizes[1] < sizes[0]:
        return named_axes(sizes, 1)
    return named_axes(sizes, 0)


def named_axes(sizes: Sequence[int], channel: int | None) -> ImageAxes:
    """Name the axes by their number: a clip has three channels, a volume another number."""
    of_space = [size for number, size in enumerate(sizes) if number != channel]
    names = ["t"] if len(of_space) == 1 else ["h", "w"]
    if len(of_space) == 3:
        names = [*("t" if channel is not None and sizes[channel] == 3 else "d"), "h", "w"]
    elif len(of_space) == 2 and channel is None:  # a spectrogram is longer than high
        names = ["t", "f"] if of_space[0] > of_space[1] else ["f", "t"]
    if channel is not None:
        names.insert(channel, "c")
    return ImageAxes(tuple(names), channel)


def axes_with(images: Tensor, channels: int) -> ImageAxes:
    """Name the dimensions of images; of two that could hold the channels, the one with so many of them does."""
    likely = likely_axes(images.shape)
    if images.ndim == 4 or likely.channels_first(images).shape[1] == channels:
        return likely
    if images.ndim == 3 and channels == 1:  # a spectrogram of few bins
        return named_axes(images.shape[1:], None)
    if channels not in images.shape[1:3]:
        return likely
    return named_axes(images.shape[1:], 0 if images.shape[1] == channels else 1)
