"""List the attention layers of a model, what can be read from them, and at what cost.

The exit status is 1 where no layer can be read.

Example: attn-monitor check timm:vit_small_patch16_dinov3 --size 256
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.backbones import find_backbones
from attn_monitor.capture.image_channels import image_channels
from attn_monitor.capture.layer_selection import stack_notes
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.observe.isolation import isolated_forward
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.sites import Site
from attn_monitor.commands.support.devices import fitting_size, naming_sizes
from attn_monitor.errors import AttentionError, NoAttentionError
from attn_monitor.grid import Grid
from attn_monitor.image_axes import ImageAxes
from attn_monitor.weights.models import load_model


def check(model: str, *, size: int | tuple[int, ...] | None = None, query: Any = "cls") -> None:
    """Run `attn-monitor check`, which this module describes.

    Args:
        model: timm:NAME, hf:NAME_OR_DIR, torchvision:NAME, hub:REPO_OR_DIR:NAME, package.module:factory or
            package.module:factory(arguments).
        size: image size in pixels, one number or [height, width], of clips and volumes [frames or slices, height,
            width]; cropped to a multiple of the patch. Without it, 224, or what the model takes where it refuses that.
        query: "cls", "mean", a token index, or [row, col] of a patch.
    """
    loaded = load_model(model)
    fitting = fitting_size(loaded, size)
    channels, order = image_channels(loaded, fitting)
    images = torch.randn(1, channels, *fitting)
    images = ImageAxes.of(order).as_given(images)
    of_size = " × ".join(map(str, fitting)) + (f" with {channels} channels" if channels != 3 else "")
    try:
        roles = find_backbones(loaded, images)
    except NoAttentionError:  # the whole of it may be run in another way
        roles = {"model": ""}
    readable = False
    for role, path in roles.items():
        backbone = loaded.get_submodule(path)
        recorder = AttentionRecorder(backbone, layers="all", query=query)
        with naming_sizes():
            sites = recorder.sites(images)
        where = f"{role} at {path}" if path else role
        print(f"{model}: {where}, {type(backbone).__name__}, images of {of_size}, {len(sites)} attention layers")
        for text in _descriptions(sites):
            print(f"  {text}")
        for note in stack_notes(sites):
            print(f"  {note}")
        read = _read(recorder, images, query)
        readable = readable or not isinstance(read, AttentionError)
        print("  " + (f"query={query!r} can be read nowhere: {read}" if isinstance(read, AttentionError) else read))
    if not readable:
        sys.exit(1)


def _descriptions(sites: Sequence[Site]) -> Iterator[str]:
    """Yield a line for each site that can be read, and for each run of sites that are refused for one reason."""
    for (reason, op, heads), group in groupby(sites, lambda site: (_reason(site), site.op, site.heads)):
        same = list(group)
        if not reason:
            yield from map(_describe, same)
            continue
        first, last = same[0], same[-1]
        index = f"{first.index:3d}" if len(same) == 1 else f"{first.index} to {last.index}"
        names = first.name if len(same) == 1 else f"{first.name} to {last.name}"
        yield f"{index} {names:32s} {_kernel(op):34s} {heads} heads, refused: {reason}"


def _reason(site: Site) -> str:
    """Return why a site is refused, without its name; empty where it can be read."""
    return "" if site.refusal is None else re.sub(r"^layer \d+ \([^)]*\) ", "", str(site.refusal))


def _describe(site: Site) -> str:
    head = f"{site.index:3d} {site.name:32s} {_kernel(site.op):34s}"
    assert site.layout is not None
    grid, prefix = Grid(site.layout.grid), len(site.layout.prefix)
    how = {"centres": "by the centres of overlapping fields"}.get(site.layout.evidence, site.layout.evidence)
    where = "" if site.layout.geometry is None else f" of {site.layout.geometry}"
    error = "mixed after the softmax" if site.mixed else f"error {site.error:.1e}"
    return f"{head} {site.heads} heads, grid {grid}{where} (places {how}) + {prefix} prefix, {error}"


def _kernel(op: str) -> str:
    """Return what a layer runs in, as people call it: an operation, an autograd function, or what is not known."""
    backend = op.removesuffix(".default").removeprefix("aten._scaled_dot_product_")
    named = {"not seen": "an unseen kernel", "not recognised": "an unknown operation", "softmax -> bmm": "softmax @ v"}
    return named.get(op, f"sdpa, {backend}" if "_scaled_dot_product_" in op else backend)


def _read(recorder: AttentionRecorder, images: torch.Tensor, query: Any) -> str | AttentionError:
    """Return the cost of reading the last layer that can be read, or why none can."""
    try:
        last = recorder(images)[-1]
    except AttentionError as error:
        return error
    return _cost(recorder.model, last, images, query)


def _cost(backbone: nn.Module, last: LayerAttention, images: torch.Tensor, query: Any, repeats: int = 7) -> str:
    """Measure the median ratio of a recording of a layer to a plain forward, in pairs."""
    recorder = AttentionRecorder(backbone, layers=last.layer, query=query)
    recorder(images)
    ratios = []
    for _ in range(repeats):
        started = time.perf_counter()
        with isolated_forward(backbone):
            default_forward(backbone, images)
        plain = time.perf_counter() - started
        started = time.perf_counter()
        recorder(images)
        ratios.append((time.perf_counter() - started) / plain)
    return f"layer {last.layer}, query={query!r}: costs {statistics.median(ratios):.2f} of a forward pass"
