"""Map the input pixels of a patch embedding to the image, which a model may pad, crop, resize, mirror or rotate.

Changes in the middle of an image, and in the whole of it, show which input pixels of the embedding depend on it. The
changes are weaker in the second half of each axis, by different factors, which shows transposed and mirrored axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.observe.forward import run_forward
from attn_monitor.capture.observe.observer import AttentionObserver
from attn_monitor.capture.observe.patch_grids import ObservedConvolutions, PatchConv
from attn_monitor.capture.token_places.ablated_model import AblatedModel
from attn_monitor.capture.token_places.synthetic_images import along_axes, evenly_changed
from attn_monitor.grid import GridGeometry

_WEAKER = (0.75, 0.5, 0.3)  # factors on changes in the second half of each axis
_CHANGED = 0.25  # share of the largest change; interpolation spreads less than this to pixels around


@dataclass(frozen=True)
class _Extent:
    """Hold the range of pixels, first to end - 1, that change along an axis, and how much weaker its second half is."""

    first: int
    end: int
    weaker: float  # log of the ratio of second to first half


class _PixelObserver(AttentionObserver):
    """Record which input pixels of convolutions differ between the first image and each of the others."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self._convolutions = ObservedConvolutions(images)
        self.changed: dict[int, list[list[_Extent]]] = {}  # by convolution, then image, then axis

    def _convolution(self, args: tuple[Any, ...], out: Tensor) -> None:
        if (x := self._convolutions.add(args, out)) is not None:
            differences, number = (x[1:] - x[:1]).abs().float().amax(1), len(self._convolutions.found) - 1
            self.changed[number] = [[_extent(d, axis) for axis in range(d.ndim)] for d in differences]


def locate_convs(ablated_model: AblatedModel, images: Tensor, convs: Sequence[PatchConv], keys: int) -> list[PatchConv]:
    """Convert the cells of the convolutions to the image's own pixels, in one forward on three images if needed.

    Cells that see only padding are removed from the grid.

    Args:
        ablated_model: The model to run.
        images: The user's images, (B, C, *size).
        convs: The convolutions, with ``seen`` set where the input is not the image itself.
        keys: Number of keys of the first site; a convolution with overlapping cells counts if it has about as many.

    Returns:
        The convolutions, without those that could not be located in the image.
    """
    size = tuple(images.shape[2:])
    asked = [conv.disjoint or (conv.on_pixels and keys - 8 <= math.prod(conv.grid) <= keys) for conv in convs]
    if not any(wanted and conv.seen is not None for conv, wanted in zip(convs, asked, strict=True)):
        return [_without_padding(conv, size) if conv.disjoint else conv for conv in convs]
    second_half = along_axes([(torch.arange(n, device="cpu") >= n // 2).float() for n in size])
    factors = (1 - (1 - weaker) * half for weaker, half in zip(_WEAKER, second_half, strict=False))
    one, other = evenly_changed(images, functools.reduce(torch.mul, factors))
    middle = one.clone()
    inner = (slice(None), *(slice(n // 4, n - n // 4) for n in size))
    middle[inner] = other[inner]
    shown = torch.stack([one, middle, other]).to(ablated_model.device)
    observer = _PixelObserver(shown)
    model = ablated_model.model
    run_forward(model, shown, ablated_model.forward, observer, dict(model.named_modules()).items())
    located = []
    for index, conv in enumerate(convs):
        if asked[index] and conv.seen is not None:
            boxes = observer.changed.get(index)
            found = None if boxes is None else _in_image_pixels(conv, size, *boxes)
            if found is None:
                continue
            conv = found
        located.append(_without_padding(conv, size) if conv.disjoint else conv)
    return located


def _extent(change: Tensor, axis: int) -> _Extent:
    """Measure which lines of an axis have large changes (*size)."""
    change = change.movedim(axis, 0).flatten(1)
    lines = change.amax(1)
    found = (lines > _CHANGED * lines.max()).nonzero()[:, 0]
    if not len(found):
        return _Extent(0, 0, 0.0)
    first, end = int(found[0]), int(found[-1]) + 1
    half = (end - first) // 2
    strength = [float(part.square().mean()) for part in (change[first : first + half], change[end - half : end])]
    return _Extent(first, end, 0.5 * math.log(strength[1] / strength[0]) if half and min(strength) > 0 else 0.0)


def _in_image_pixels(
    conv: PatchConv, size: Sequence[int], middle: list[_Extent], whole: list[_Extent]
) -> PatchConv | None:
    """Convert the cells of one convolution to the image's pixels.

    Args:
        conv: The convolution, with cells in pixels of its own input.
        size: Number of pixels on each axis of the image.
        middle: Per axis of the input, what changes with the middle of the image.
        whole: Per axis of the input, what changes with the whole image.

    Returns:
        The convolution, None where no resize, crop or shift explains the changes.
    """
    order = sorted(range(len(size)), key=lambda axis: abs(middle[axis].weaker))  # of the input's axes in the image
    origins, cells, margin, mirrored = [], [], [], []
    for axis, pixels in zip(order, size, strict=True):
        backwards = middle[axis].weaker > 0
        found = _pixel_map(pixels, middle[axis], whole[axis], backwards)
        if found is None:
            return None
        scale, shift = found
        first = conv.geometry.origin[axis] + backwards * conv.grid[axis] * conv.geometry.cell[axis]
        origins.append((first - shift) / scale)
        cells.append(conv.geometry.cell[axis] / abs(scale))
        margin += [beyond / abs(scale) for beyond in conv.geometry.margin[axis : axis + 1]]
        mirrored.append(backwards)
    geometry = GridGeometry(tuple(origins), tuple(cells), tuple(margin))
    return PatchConv(
        tuple(conv.grid[axis] for axis in order), geometry, conv.disjoint, mirrored=tuple(mirrored), on_pixels=True
    )


def _pixel_map(pixels: int, middle: _Extent, whole: _Extent, backwards: bool) -> tuple[float, float] | None:
    """Return (scale, shift) of one axis, by which image pixel x goes to scale · x + shift; None if none fits."""
    first, last = pixels // 4, pixels - pixels // 4
    begin, end, left, right = middle.first, middle.end, whole.first, whole.end
    if end - begin == last - first:
        return (-1.0, float(begin + last)) if backwards else (1.0, float(begin - first))
    resized = (right - left) / pixels, float(left)  # the whole image is seen
    scale = (end - begin) / (last - first)
    cropped = scale, (begin + end) / 2 - scale * pixels / 2
    for times, shift in (resized, cropped):  # the middle maps to itself in both directions
        blur = 1 + times
        ends = max(left, shift), min(right, times * pixels + shift)
        expected = times * first + shift, times * last + shift, *ends
        if times > 0 and all(abs(a - b) <= blur for a, b in zip(expected, (begin, end, left, right), strict=True)):
            return (-times, shift + times * pixels) if backwards else (times, shift)
    return None


def _without_padding(conv: PatchConv, size: Sequence[int]) -> PatchConv:
    """Remove the lines of cells that see nothing of the image."""
    axes = [cells[cells >= 0] for cells in conv.placed_grid.cells_of_pixels(size)]
    if not all(len(cells) for cells in axes):
        return conv
    begins = zip(conv.geometry.origin, conv.geometry.cell, axes, strict=True)
    geometry = GridGeometry(tuple(o + c * int(cells[0]) for o, c, cells in begins), conv.geometry.cell)
    return replace(conv, grid=tuple(int(cells[-1] - cells[0]) + 1 for cells in axes), geometry=geometry)
