"""`attn-monitor show`: a model's attention on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.panels import panel
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.offline.models import load_model
from attn_monitor.offline.results import print_metrics, writing_to
from attn_monitor.probe.probe_batch import ProbeBatch


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
        model: timm:NAME, hf:NAME_OR_DIR, torchvision:NAME, hub:REPO_OR_DIR:NAME, package.module:factory or
            package.module:factory(arguments).
        images: an image file or a folder.
        out: folder for the pictures and for attention.npz (an AttentionSnapshot).
        checkpoint: file or folder of weights to load instead of the library's own: of Lightning, DINO, DINOv2 or
            DINOv3, of torch.save, safetensors or torch.distributed.checkpoint.
        key: what to take from the checkpoint: student, teacher, or a prefix of names in it, such as
            student.backbone; without it a teacher before a student.
        weights: whether to load the library's own pretrained weights where no checkpoint is given.
        allow_missing: accept a checkpoint that lacks a part of the backbone, which stays at random.
        trust: unpickle what else the checkpoint holds, which can run any code; for files whose author you know.
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
    choice: dict[str, Any] = {"key": key, "allow_missing": allow_missing, "trust": trust}
    loaded = load_model(model, checkpoint=checkpoint, weights=weights and checkpoint is None, **choice)
    probe = ProbeBatch.from_path(images, size=size, num_images=num_images, masks=masks)
    monitor = AttentionMonitor(probe, layers=layers, query=query, threshold=threshold, metrics=metrics)
    snapshot = monitor.snapshot({"backbone": loaded}, step=0)
    options = DrawingOptions(threshold, scale, None if heads is None else tuple(heads))
    with writing_to(Path(out)) as folder:
        for index, (name, pixels) in enumerate(zip(probe.names, probe.pixels, strict=True)):
            for layer in snapshot.layers_of("backbone"):
                path = folder / f"{name}-layer{layer}.png"
                truth = None if probe.masks is None else probe.masks[index].numpy()
                Image.fromarray(panel(snapshot, index, pixels, layer=layer, truth=truth, options=options)).save(path)
                print(path)
        snapshot.save(folder / "attention.npz")
        print(folder / "attention.npz")
    print_metrics(snapshot)
