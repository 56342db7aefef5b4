"""A probe as tensors and plain values, in a file or a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_monitor.errors import ArchiveError
from attn_monitor.image_axes import likely_axes, parse_axes
from attn_monitor.probe.bands import are_bands
from attn_monitor.probe.normalisation import normalise
from attn_monitor.record.header_fields import Fields
from attn_monitor.record.npz import TensorReader

if TYPE_CHECKING:
    from attn_monitor.probe.probe_batch import ProbeBatch


def stored_tensors(probe: ProbeBatch) -> dict[str, Tensor]:
    """Return the images, as bytes if that is lossless, and the masks."""
    stored = {"images": probe.images}
    plain = probe.images.ndim == 4 and probe.image_axes.channel == 0 and probe.bands == (0, 1, 2)
    if plain and probe.images.shape[1] == 3:
        pixels = torch.from_numpy(probe.pixels).permute(0, 3, 1, 2).contiguous()
        if torch.equal(normalise(pixels, probe.mean, probe.std), probe.images):
            stored = {"pixels": pixels}
    return stored if probe.masks is None else {**stored, "masks": probe.masks}


def read_probe(header: Fields, read: TensorReader) -> dict[str, Any]:
    """Return the arguments of a stored probe; `ArchiveError` if it is not valid."""
    names, mean, std = header.names("names"), header.numbers("mean"), header.numbers("std")
    axes = header.text("axes") if "axes" in header else None
    sizes = [len(mean) if letter == "c" else None for letter in axes or "chw"]
    images = read("images", ("float32", "float16", "float64", "bfloat16"), (len(names), *sizes))
    if not 0 < len(mean) == len(std) or 0 in std:
        raise ArchiveError(f"mean={mean}, std={std} in the {header.where}; expected one each per channel, no std of 0")
    if images is None:
        pixels = read("pixels", ("uint8",), (len(names), 3, None, None))
        if pixels is None or len(mean) != 3:
            raise ArchiveError("has neither 'images' nor 'pixels' with a mean and std for each channel")
        images = normalise(pixels, mean, std)
    size = (parse_axes(axes, images) or likely_axes(images.shape)).channels_first(images).shape[2:]
    masks = read("masks", ("bool",), (len(names), None, *size))
    caption, source = header.text("caption"), header.text("source")
    bands = header.integers("bands") if "bands" in header else None
    if bands is not None and not are_bands(bands, len(mean)):
        raise ArchiveError(f"bands={bands} in the {header.where}, expected one or three of {len(mean)} channels")
    probe = {"images": images, "mean": mean, "std": std, "masks": masks, "names": names}
    return {**probe, "caption": caption, "source": source, "axes": axes, "bands": bands}
