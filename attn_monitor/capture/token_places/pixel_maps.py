"""Where the pixels that a patch embedding sees come from in the image: padded, cropped, resized, or all of these.

A model that pads its images, or resizes or crops them, calls its patch embedding with others than it was given. Noise
in the middle of an image, and in all of it, shows which of the pixels that arrive there depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attn_monitor.capture.forward import run_forward
from attn_monitor.capture.observer import AttentionObserver
from attn_monitor.capture.patch_grids import PatchConv
from attn_monitor.capture.token_places.silent_model import SilentModel
from attn_monitor.capture.token_places.synthetic_images import noise_images
from attn_monitor.grid_geometry import GridGeometry

_CHANGED = 0.25  # of the largest change: interpolation spreads little of it to pixels around


class _PixelObserver(AttentionObserver):
    """Keeps which pixels differ between the first image and each of the others where convolutions see other pixels."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(lambda *_: None, lambda _: None, images=images, verify=False)
        self.changed: dict[
            int, list[list[tuple[int, int]]]
        ] = {}  # by convolution: of each image, first and end by axis

    def _saw_other_pixels(self, x: Tensor) -> None:
        differences = (x[1:] - x[:1]).abs().float().amax(1)  # (B - 1, H, W)
        boxes = [[_extent(d.amax(1)), _extent(d.amax(0))] for d in differences]
        self.changed[len(self.convs) - 1] = boxes


def locate_convs(silent_model: SilentModel, images: Tensor, convs: Sequence[PatchConv]) -> list[PatchConv]:
    """The convolutions with their cells in the image's own pixels; those whose place in it is not found are left out.

    Cells that see nothing of the image, only padding, are no part of a grid. Three images are asked about where a
    convolution did not see the image as it is.
    """
    size = images.shape[-2], images.shape[-1]
    if not any(conv.disjoint and conv.seen is not None for conv in convs):
        return [_without_padding(conv, size) if conv.disjoint else conv for conv in convs]
    one, other = noise_images(images, 2, seed=8)
    middle = one.clone()
    rows, cols = (slice(n // 4, n - n // 4) for n in size)
    middle[:, rows, cols] = other[:, rows, cols]
    asked = torch.stack([one, middle, other]).to(silent_model.device)
    observer = _PixelObserver(asked)
    model = silent_model.model
    run_forward(model, asked, silent_model.forward, observer, dict(model.named_modules()).items())
    located = []
    for index, conv in enumerate(convs):
        if conv.disjoint and conv.seen is not None:
            boxes = observer.changed.get(index)
            geometry = None if boxes is None else _in_image_pixels(conv, size, *boxes)
            if geometry is None:
                continue
            conv = replace(conv, geometry=geometry, seen=None)
        located.append(_without_padding(conv, size) if conv.disjoint else conv)
    return located


def _extent(change: Tensor) -> tuple[int, int]:
    """The first of the places along an axis that have changed, and the one after the last."""
    found = (change > _CHANGED * change.max()).nonzero()[:, 0]
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def _in_image_pixels(
    conv: PatchConv, size: tuple[int, int], middle: list[tuple[int, int]], whole: list[tuple[int, int]]
) -> GridGeometry | None:
    """A convolution's cells in the image's pixels, from what changes when its middle does, and when all of it does."""
    maps = [_pixel_map(n, m, w) for n, m, w in zip(size, middle, whole, strict=True)]
    known = [found for found in maps if found is not None]
    if len(known) < len(maps):
        return None
    origin = tuple((o - shift) / scale for o, (scale, shift) in zip(conv.geometry.origin, known, strict=True))
    return GridGeometry(origin, tuple(c / scale for c, (scale, _) in zip(conv.geometry.cell, known, strict=True)))


def _pixel_map(pixels: int, middle: tuple[int, int], whole: tuple[int, int]) -> tuple[float, float] | None:
    """(scale, shift) of one axis: pixel x of the image comes to scale · x + shift. None where none explains it."""
    first, last = pixels // 4, pixels - pixels // 4
    (begin, end), (left, right) = middle, whole
    if end - begin == last - first:
        return 1.0, float(begin - first)
    resized = (right - left) / pixels, float(left)  # all of the image
    scale = (end - begin) / (last - first)
    cropped = scale, (begin + end) / 2 - scale * pixels / 2
    for times, shift in (resized, cropped):
        blur = 1 + times
        ends = max(left, shift), min(right, times * pixels + shift)
        expected = times * first + shift, times * last + shift, *ends
        if times > 0 and all(abs(a - b) <= blur for a, b in zip(expected, (*middle, *whole), strict=True)):
            return times, shift
    return None


def _without_padding(conv: PatchConv, size: tuple[int, int]) -> PatchConv:
    """The same without the rows and columns of cells that see nothing of the image."""
    axes = [cells[cells >= 0] for cells in conv.geometry.cells_of_pixels(conv.grid, size)]
    if not all(len(cells) for cells in axes):
        return conv
    (top, bottom), (left, right) = ((int(cells[0]), int(cells[-1])) for cells in axes)
    begins = zip(conv.geometry.origin, conv.geometry.cell, (top, left), strict=True)
    geometry = GridGeometry(tuple(o + c * first for o, c, first in begins), conv.geometry.cell)
    return replace(conv, grid=(bottom - top + 1, right - left + 1), geometry=geometry)
