"""The `attn-monitor` commands: check a model, show an image's attention, redraw a finished run."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from attn_monitor.capture.backbones import find_backbones
from attn_monitor.capture.forward import default_forward
from attn_monitor.capture.isolation import isolated_forward
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.sites import Site
from attn_monitor.draw.animations import gif
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.panels import panel
from attn_monitor.draw.strips import filmstrip
from attn_monitor.errors import ArchiveError, AttentionError, NoAttentionError
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.offline.models import load_model
from attn_monitor.record.archive import load_snapshots
from attn_monitor.record.file_names import tag_safe_names
from attn_monitor.record.probe import ProbeBatch
from attn_monitor.record.snapshot import AttentionSnapshot


def check(model: str, *, size: int | tuple[int, int] = 224, query: Any = "cls") -> None:
    """Say which attention a model has and what can be read from it.

    Args:
        model: timm:NAME, hf:NAME, torchvision:NAME, or package.module:callable.
        size: image size in pixels, one number or [height, width].
        query: "cls", "mean", a token index, or [row, col] of a patch.
    """
    loaded = load_model(model)
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(1, 3, height, width)
    try:
        roles = find_backbones(loaded)
    except NoAttentionError:  # by its modules' names; running it may tell otherwise
        roles = {"model": ""}
    for role, path in roles.items():
        backbone = loaded.get_submodule(path)
        recorder = AttentionRecorder(backbone, layers="all", query=query)
        sites = recorder.sites(images)
        where = f"{role} at {path}" if path else role
        print(
            f"{model}: {where}, {type(backbone).__name__}, images of {height} × {width}, {len(sites)} attention layers"
        )
        for site in sites:
            print("  " + _describe(site))
        print("  " + _cost(backbone, recorder, images, query))


def _describe(site: Site) -> str:
    head = f"{site.index:3d} {site.name:32s} {site.op.removeprefix('aten._scaled_dot_product_'):34s}"
    if site.refusal is not None or site.layout is None:
        return f"{head} {site.heads} heads, refused: {site.refusal}"
    (gh, gw), prefix = site.layout.grid, len(site.layout.prefix)
    how = {"centres": "by the centres of overlapping fields"}.get(site.layout.evidence, site.layout.evidence)
    error = "mixed after the softmax" if site.mixed else f"error {site.error:.1e}"
    return f"{head} {site.heads} heads, grid {gh} × {gw} (places {how}) + {prefix} prefix, {error}"


def _cost(backbone: nn.Module, recorder: AttentionRecorder, images: torch.Tensor, query: Any, repeats: int = 7) -> str:
    """Median ratio of a recording of the last readable layer to a plain forward, measured in pairs."""
    try:
        last = recorder(images)[-1]
    except AttentionError as error:
        return f"query={query!r} can be read nowhere: {error}"
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


def show(
    model: str,
    images: str,
    *,
    out: str = "attention",
    checkpoint: str | None = None,
    key: str | None = None,
    weights: bool = True,
    size: int | tuple[int, int] = 224,
    num_images: int = 8,
    layers: Any = -1,
    query: Any = "cls",
    threshold: float = 0.6,
    scale: str = "uniform",
    heads: list[int] | None = None,
    masks: str | None = None,
    metrics: Any = None,
) -> None:
    """Draw a model's attention on an image or a folder of images, one PNG each, with the raw numbers beside them.

    Prints the metrics of each layer, means over heads and images.

    Args:
        model: timm:NAME, hf:NAME, torchvision:NAME, or package.module:callable.
        images: an image file or a folder.
        out: folder for the pictures and for attention.npz (an AttentionSnapshot).
        checkpoint: file of weights to load instead of the library's own.
        key: what to take from the checkpoint, such as student.backbone; without it a teacher before a student.
        weights: whether to load the library's own pretrained weights where no checkpoint is given.
        size: image size in pixels, one number or [height, width].
        num_images: how many images of a folder.
        layers: index, module path, list of these, or "all".
        query: "cls", "mean", a token index, or [row, col] of a patch.
        threshold: share of attention mass inside the outline.
        scale: "uniform" (comparable) or "minmax" (each map for itself).
        heads: heads to draw; all by default.
        masks: folder of ground-truth masks, PNGs with the images' names, for an outline and the Jaccard index.
        metrics: names of metrics; by default all but distance, "all" for that too.
    """
    loaded = load_model(model, checkpoint=checkpoint, key=key, weights=weights and checkpoint is None)
    probe = ProbeBatch.from_path(images, size=size, num_images=num_images, masks=masks)
    monitor = AttentionMonitor(probe, layers=layers, query=query, threshold=threshold, metrics=metrics)
    snapshot = monitor.snapshot({"backbone": loaded}, step=0)
    options = DrawingOptions(threshold, scale, None if heads is None else tuple(heads))
    with _writing_to(Path(out)) as folder:
        for index, (name, pixels) in enumerate(zip(probe.names, probe.pixels, strict=True)):
            for layer in snapshot.layers_of("backbone"):
                path = folder / f"{name}-layer{layer}.png"
                truth = None if probe.masks is None else probe.masks[index].numpy()
                Image.fromarray(panel(snapshot, index, pixels, layer=layer, truth=truth, options=options)).save(path)
                print(path)
        snapshot.save(folder / "attention.npz")
        print(folder / "attention.npz")
    _print_metrics(snapshot)


def replay(archive: str, *, out: str | None = None, scale: str = "uniform", threshold: float = 0.6) -> None:
    """Redraw a run from its archive: for each probe image a film strip, an animation and the last panel.

    Args:
        archive: the attn_monitor folder in the log directory of a run.
        out: folder for the pictures; by default `pictures` inside the archive.
        scale: "uniform" (comparable) or "minmax" (each map for itself).
        threshold: share of attention mass inside the outline.
    """
    history = load_snapshots(archive)
    probe = ProbeBatch.load(Path(archive) / "probe.npz")
    for snapshot in history:
        if tag_safe_names(snapshot.names) != probe.names:
            raise ArchiveError(
                f"{archive}: step {snapshot.step} shows {', '.join(snapshot.names)}, and probe.npz holds "
                f"{', '.join(probe.names)}: these are files of two runs"
            )
    options = DrawingOptions(threshold, scale)
    with _writing_to(Path(out) if out is not None else Path(archive) / "pictures") as folder:
        for index, (name, pixels) in enumerate(zip(probe.names, probe.pixels, strict=True)):
            truth: np.ndarray[Any, Any] | None = None if probe.masks is None else probe.masks[index].numpy()
            caption = probe.caption
            frames = [panel(s, index, pixels, truth=truth, caption=caption, options=options) for s in history]
            strip = filmstrip(history, index, pixels, options=options)
            Image.fromarray(frames[-1]).save(folder / f"{name}-panel.png")
            Image.fromarray(strip).save(folder / f"{name}-filmstrip.png")
            (folder / f"{name}.gif").write_bytes(gif(frames))
            print(f"{folder / name}-panel.png, -filmstrip.png, .gif")
    _print_metrics(history[-1])
    flags = [flag for snapshot in history for flag in snapshot.flags]
    print(f"health flags raised in this run: {len(flags) or 'none'}")
    for flag in flags:
        print(f"  {flag}")


@contextmanager
def _writing_to(folder: Path) -> Iterator[Path]:
    """A folder for results; that it cannot be written to is told with its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise OSError(f"out={folder}: cannot be written to ({reason}); pass another folder, or make room") from error


def _print_metrics(snapshot: AttentionSnapshot) -> None:
    """Means over heads and images, one line for each role and layer."""
    print(f"metrics at step {snapshot.step:,}:")
    for role, layer in snapshot.layers:
        values = snapshot.metrics.of_layer(role, layer)
        print(f"  {role}, layer {layer}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))


def main() -> None:
    """Entry point of `attn-monitor`: mistakes are told in one line, without a traceback."""
    from jsonargparse import auto_cli

    try:
        auto_cli([check, show, replay], as_positional=True)
        sys.stdout.flush()  # a full disk is met here, and not while Python ends
    except (AttentionError, OSError, ValueError) as error:  # what files, models and arguments can be wrong with
        sys.exit(f"attn-monitor: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
