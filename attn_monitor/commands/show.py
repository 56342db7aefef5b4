"""Draw a model's attention on an image or a folder of images, one PNG each, with the raw numbers beside them.

Prints the path of every file, and the metrics of each layer, means over heads and images.

Example: attn-monitor show timm:vit_small_patch16_224.dino photos/ --size 480 --separate --scale minmax
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.image_channels import image_channels
from attn_monitor.commands.support.devices import choose_device, fitting_size, move_to, naming_sizes, with_memory_for
from attn_monitor.commands.support.matrices import save_matrices
from attn_monitor.commands.support.outliers import find_outliers, without_outliers
from attn_monitor.commands.support.patch_rows import FILE_ROOM, page_of_model
from attn_monitor.commands.support.results import (
    check_all_read,
    check_out,
    doing,
    notify,
    print_metrics,
    progress,
    results_in,
)
from attn_monitor.commands.support.runs import SHOWN
from attn_monitor.commands.support.separate import separate_pictures
from attn_monitor.draw.canvas import Pixels
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.panels import panel
from attn_monitor.measure.outliers import CUTOFF, LEAST_RATIO, Outliers
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.player.report import write_whole
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.snapshot import Snapshot
from attn_monitor.weights.models import load_model

ROLE = "backbone"


def show(
    model: str,
    images: str,
    *,
    out: str = "attention",
    checkpoint: str | None = None,
    key: str | None = None,
    weights: bool = True,
    allow_missing: bool = False,
    trust: bool = False,
    size: int | tuple[int, ...] | None = None,
    num_images: int = 8,
    layers: Any = -1,
    query: Any = "cls",
    masks: str | None = None,
    bands: tuple[int, ...] | None = None,
    large_images: bool = False,
    metrics: Any = None,
    drawing: DrawingOptions = DrawingOptions(),
    separate: bool = False,
    raw: bool = False,
    player: bool = False,
    drop_artifacts: bool = False,
    device: str | None = None,
) -> None:
    """Run `attn-monitor show`, which this module describes.

    Args:
        model: timm:NAME, hf:NAME_OR_DIR, torchvision:NAME, hub:REPO_OR_DIR:NAME, package.module:factory or
            package.module:factory(arguments).
        images: an image file or a folder.
        out: folder for the pictures, attention.npz (a `Snapshot`) and probe.npz, which `compare` takes.
        checkpoint: file or folder of weights to load instead of the library's own: of Lightning, DINO, DINOv2 or
            DINOv3, of torch.save, safetensors or torch.distributed.checkpoint.
        key: what to take from the checkpoint: student, teacher, or a prefix of names in it, such as
            student.backbone; without it a teacher before a student.
        weights: whether to load the library's own pretrained weights where no checkpoint is given.
        allow_missing: accept a checkpoint that lacks a part of the backbone, which stays at random.
        trust: unpickle what else the checkpoint holds, which can run any code; for files whose author you know.
        size: image size in pixels, one number or [height, width], of clips and volumes [frames or slices, height,
            width]; cropped to a multiple of the patch. Without it, 224, or what the model takes where it refuses that.
            Images are resized to cover it and cropped at the centre.
        num_images: how many images of a folder.
        layers: index, module path, list of these, or "all".
        query: "cls", "mean", a token index, or [row, col] of a patch.
        masks: folder of ground-truth masks, PNGs with the images' names, for an outline and the Jaccard index.
        bands: which channels pictures show, one in grey or three in red, green and blue, counted from 0.
        large_images: read images of more than Pillow's limit of 89 million pixels.
        metrics: names of metrics; by default all but distance, "all" for that too.
        drawing: how to draw; its values are options of their own.
        separate: also write single pictures of the input's size: img.png, and for each layer heatmap.png and
            overlay.png (the mean over heads), attn-head{j}.png, mask_th{t}_mean.png and mask_th{t}_head{j}.png. Several
            images have a folder each, of the image's name, and several layers folders layer{L} in it.
        raw: also write the whole attention matrix of each image and layer, {name}-layer{L}.npy, (heads, queries, keys).
        player: also write player.html, an interactive page: a click on a patch shows what this patch attends to, of all
            patches or of evenly spaced ones, as many as fit into 8 MB.
        drop_artifacts: leave outlier patches out of the pictures: tokens with a norm far above the others',
            or where norms are not known, that receive far more attention. They are listed and hatched.
        device: where the model runs; by default a GPU if there is one. When memory runs out, images are taken a few at
            a time, then on the CPU.
    """
    check_out(Path(out))
    chosen_device = choose_device(device)
    choice: dict[str, Any] = {"key": key, "allow_missing": allow_missing, "trust": trust}
    with doing(f"loading {model}"):
        torch.manual_seed(0)  # for weights that stay at random
        loaded = load_model(model, checkpoint=checkpoint, weights=weights and checkpoint is None, **choice)
    fitting = fitting_size(loaded, size)
    channels, axes = image_channels(loaded, fitting)
    unreadable = list[str]()
    reading: dict[str, Any] = {"masks": masks, "bands": bands, "large_images": large_images}
    reading |= {"channels": channels, "axes": axes, "onerror": unreadable.append}
    probe = ProbeBatch.from_folder(images, size=fitting, num_images=num_images, **reading)
    monitor = AttentionMonitor(probe, layers=layers, query=query, threshold=drawing.threshold, metrics=metrics)
    move_to(chosen_device, loaded)
    of_size = " × ".join(map(str, probe.images.shape[1:]))
    with naming_sizes(images), doing(f"running {model} on {len(probe)} images of {of_size}"):
        snapshot = monitor.colored(with_memory_for(lambda: monitor.snapshot({ROLE: loaded}, step=0), loaded))
    monitor.check_heads(drawing.drawn_heads)
    for text in _notes(monitor):
        notify(text)
    note = "" if weights or checkpoint is not None else " · weights at random, seed 0"
    captured, outliers = snapshot.layers_of(ROLE), {}
    if drop_artifacts:
        find = partial(find_outliers, loaded, probe.images, captured, monitor.query)
        with doing("looking for outlier patches"):
            outliers = with_memory_for(find, loaded)
        _print_outliers(outliers, probe.names)
    with results_in(Path(out)) as results:
        folder = results.folder
        for name, picture in _pictures(without_outliers(snapshot, outliers), probe, outliers, drawing, separate, note):
            results.save(folder / name, picture)
        probe.save(folder / "probe.npz")  # `compare` needs it to know that two results show the same images
        snapshot.save(folder / SHOWN)
        results.add(folder / SHOWN)
        results.add(folder / "probe.npz")
        if raw:
            settings: dict[str, Any] = {"names": probe.names, "layers": captured, "query": monitor.query}
            for path in with_memory_for(lambda: save_matrices(loaded, probe.images, folder, **settings), loaded):
                results.add(path)
        if player:
            make = partial(page_of_model, loaded, probe, snapshot, monitor.query, FILE_ROOM)
            write_whole(folder / "player.html", with_memory_for(make, loaded))
            results.add(folder / "player.html")
    print_metrics(snapshot, "metrics, means over heads and images")
    check_all_read(unreadable)


def _notes(monitor: AttentionMonitor) -> list[str]:
    notes = monitor.left_out()
    if monitor.images_at_a_time < len(monitor.probe):
        notes.append(f"memory ran out with all {len(monitor.probe)} images: took {monitor.images_at_a_time} at a time")
    return notes


def _print_outliers(outliers: Mapping[int, Outliers], names: Sequence[str]) -> None:
    print(
        f"outlier patches, more than {CUTOFF:g} robust standard deviations above their image's median and at least "
        f"{LEAST_RATIO:g} times it; they are left out of the pictures alone: attention.npz, matrices and metrics hold "
        "the model's own numbers"
    )
    for layer, found in outliers.items():
        for image, name in enumerate(names):
            for reason in found.reasons(image):
                print(f"  {name}, layer {layer}: {reason}")
        if not found.patches.any():
            print(f"  layer {layer}: none, by their {found.quantity}")


def _pictures(
    snapshot: Snapshot,
    probe: ProbeBatch,
    outliers: Mapping[int, Outliers],
    options: DrawingOptions,
    separate: bool,
    note: str,
) -> Iterator[tuple[str, Pixels]]:
    """Yield names of files and panels of each image and layer, then single pictures where they are wanted."""
    photos = probe.pixels
    for index, (name, photo) in enumerate(progress(list(zip(probe.names, photos, strict=True)), "pictures")):
        for layer in snapshot.layers_of(ROLE):
            truth = None if probe.masks is None else probe.plane_masks[index].numpy()
            hatched = _in_plane(outliers[layer].patches)[index].numpy() if layer in outliers else None
            header = f"{name} · {' x '.join(map(str, probe.channels_first.shape[2:]))} pixels{note}"
            drawn = panel(
                snapshot,
                index,
                photo,
                layer=layer,
                truth=truth,
                header=header,
                hatched=hatched,
                caption=probe.shown_caption,
                frames=probe.frames_of(index),
                options=options,
            )
            yield f"{name}-layer{layer}.png", drawn
    if separate:
        patches = {layer: _in_plane(found.patches) for layer, found in outliers.items()}
        single = separate_pictures(snapshot, photos, role=ROLE, hatched=patches, options=options)
        yield from progress(single, "single pictures")


def _in_plane(patches: Tensor) -> Tensor:
    """Return which patches (B, gh, gw) were left out in any frame or slice of (B, *grid)."""
    return patches.any(1) if patches.ndim == 4 else patches
