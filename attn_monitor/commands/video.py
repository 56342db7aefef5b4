"""Draw a model's attention over every frame of a video: the mean over heads and each head, in a new video.

Times of frames stay as they are; sound is left out.

Example: attn-monitor video timm:vit_small_patch16_224.dino clip.mp4 --out attention.mp4 --outside photo
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.commands.support.devices import choose_device, move_to, patch_size, with_memory_for
from attn_monitor.commands.support.frames import read_frames
from attn_monitor.commands.support.results import check_out, notify, progress, writing_to
from attn_monitor.distributed import is_out_of_memory
from attn_monitor.draw.animation_files import animation_file, check_ending
from attn_monitor.draw.canvas import Pixels, resize
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.video_frames import FrameDrawing
from attn_monitor.probe.image_folder import check_size
from attn_monitor.probe.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise
from attn_monitor.weights.models import load_model

Size = int | tuple[int, int] | None
USUAL_PATCH = 16, 16  # where the model's own is not known


def video(
    model: str,
    video: str,
    *,
    out: str = "attention.mp4",
    checkpoint: str | None = None,
    key: str | None = None,
    weights: bool = True,
    allow_missing: bool = False,
    trust: bool = False,
    size: int | tuple[int, int] | None = 224,
    fps: float | None = None,
    layers: Any = -1,
    query: Any = "cls",
    outside: str = "attention",
    drawing: DrawingOptions = DrawingOptions(),
    batch: int = 8,
    device: str | None = None,
) -> None:
    """Run `attn-monitor video`, which this module describes.

    Args:
        model: timm:NAME, hf:NAME_OR_DIR, torchvision:NAME, hub:REPO_OR_DIR:NAME, package.module:factory or
            package.module:factory(arguments).
        video: a video file, which needs PyAV (extra "video"), or a folder of frames.
        out: file to write: .mp4 (by PyAV too), or .webp or .gif, which hold their pictures in memory until the end.
        checkpoint: file or folder of weights to load instead of the library's own, as in `show`.
        key: what to take from the checkpoint: student, teacher, or a prefix of names in it, such as
            student.backbone; without it a teacher before a student.
        weights: whether to load the library's own pretrained weights where no checkpoint is given.
        allow_missing: accept a checkpoint that lacks a part of the backbone, which stays at random.
        trust: unpickle what else the checkpoint holds, which can run any code; for files whose author you know.
        size: the shorter side of frames in pixels, cropped to a multiple of the patch; [height, width] to be covered
            and cropped to just that; null for frames as they are.
        fps: frames per second of a folder, 25 by default.
        layers: index, module path, list of these, or "all".
        query: "cls", "mean", a token index, or [row, col] of a patch.
        outside: what is shown outside the outline: "attention", "photo" in grey, or "black".
        drawing: how to draw; its values are options of their own.
        batch: frames that go through the model together.
        device: where the model runs; by default a GPU if there is one. When memory runs out, frames are taken a few at
            a time, then on the CPU.
    """
    path = check_ending(Path(out))
    draw = FrameDrawing(drawing, outside)
    frames = read_frames(Path(video), fps)
    check_out(path.parent)
    chosen_device = choose_device(device)
    choice: dict[str, Any] = {"key": key, "allow_missing": allow_missing, "trust": trust}
    loaded = load_model(model, checkpoint=checkpoint, weights=weights and checkpoint is None, **choice)
    move_to(chosen_device, loaded)
    seconds: deque[Any] = deque()

    def pixels() -> Iterator[Pixels]:
        for frame in frames:
            seconds.append(frame.seconds)
            yield frame.pixels

    pictures = attention_video(loaded, pixels(), layers=layers, query=query, size=size, batch=batch, drawing=draw)
    first = next(pictures, None)
    if first is None:
        raise ValueError(frames.missing or f"{video}: has no frames")
    with writing_to(path.parent), animation_file(path) as animation:
        for picture in progress(chain([first], pictures), "frames", frames.count):
            animation.add(picture, seconds.popleft())
    print(path)
    if frames.missing:
        raise ValueError(f"{frames.missing}. What could be read is in {path}")


def attention_video(
    model: nn.Module,
    frames: Iterable[Pixels],
    *,
    layers: Any = -1,
    query: Any = "cls",
    size: Size = 224,
    batch: int = 8,
    drawing: FrameDrawing | None = None,
) -> Iterator[Pixels]:
    """Draw a model's attention on the frames of a video, one after another.

    Args:
        model: runs on its device, on frames normalised by ImageNet's mean and std.
        frames: uint8 (H, W, 3) each; ``batch`` of them are held at a time.
        layers: index, module path, list of these, or "all".
        query: "cls", "mean", a token index, or (row, col) of a patch.
        size: the shorter side in pixels, (height, width) to be covered, or None for the frames' own size.
        batch: frames that go through the model together; fewer where memory runs out.
        drawing: how frames are drawn.

    Yields:
        A picture of each frame, uint8 (height, width, 3), all of one size.

    Raises:
        ValueError: an argument is out of range.
        AttentionError: the model's attention cannot be read.
        DeviceError: memory does not suffice for one frame, not even on the CPU.
    """
    drawing = FrameDrawing() if drawing is None else drawing
    for photos, recorded in recorded_batches(model, frames, layers=layers, query=query, size=size, batch=batch):
        _check_heads(drawing.options.drawn_heads, recorded)
        for image, photo in enumerate(photos):
            yield drawing.draw(photo, recorded, image)


def recorded_batches(
    model: nn.Module, frames: Iterable[Pixels], *, layers: Any, query: Any, size: Size, batch: int
) -> Iterator[tuple[list[Pixels], list[LayerAttention]]]:
    """Yield frames in the size that the model gets, and its attention on them, a batch at a time.

    Where memory runs out, batches become smaller; where it does with one frame, the model moves to the CPU.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 frame")
    recorder = AttentionRecorder(model, layers=layers, query=query, nonfinite="keep")
    patch, wanted = patch_size(model) or USUAL_PATCH, None
    remaining = iter(frames)
    waiting: list[Pixels] = []
    while waiting := waiting or list(islice(remaining, batch)):
        wanted = wanted or model_size((waiting[0].shape[0], waiting[0].shape[1]), size, patch)
        photos = [_cover(frame, *wanted) for frame in waiting[:batch]]
        try:
            recorded = _record(recorder, photos)
        except Exception as error:
            if not is_out_of_memory(error) or len(photos) == 1:
                raise
            batch = (len(photos) + 1) // 2
            notify(f"memory ran out with {len(photos)} frames: going on with {batch} at a time")
            continue
        waiting = waiting[batch:]
        yield photos, recorded


def _record(recorder: AttentionRecorder, photos: list[Pixels]) -> list[LayerAttention]:
    images = _normalise(photos)
    if len(photos) > 1:
        return recorder(images)
    return with_memory_for(lambda: recorder(images), recorder.model)


def model_size(frame: tuple[int, int], size: Size, patch: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the (height, width) to which a frame is resized, and that to which it is then cropped."""
    height, width = frame
    if size is not None:
        check_size(size)
    if isinstance(size, (tuple, list)):
        factor = max(size[0] / height, size[1] / width)
        return (max(size[0], round(height * factor)), max(size[1], round(width * factor))), (size[0], size[1])
    factor = 1 if size is None else size / min(frame)
    resized = round(height * factor), round(width * factor)
    cropped = resized[0] // patch[0] * patch[0], resized[1] // patch[1] * patch[1]
    if 0 in cropped:
        raise ValueError(
            f"size={size}: frames of {height} × {width} become {resized[0]} × {resized[1]} pixels, expected at least "
            f"one patch of {patch[0]} × {patch[1]}"
        )
    return resized, cropped


def _cover(frame: Pixels, resized: tuple[int, int], cropped: tuple[int, int]) -> Pixels:
    """Resize a frame, then crop it at the centre."""
    if frame.shape[:2] != resized:
        frame = resize(frame, resized, Image.Resampling.BICUBIC)
    top, left = ((r - c) // 2 for r, c in zip(resized, cropped, strict=True))
    return np.ascontiguousarray(frame[top : top + cropped[0], left : left + cropped[1]])


def _normalise(photos: list[Pixels]) -> torch.Tensor:
    """Normalise frames by ImageNet's mean and std: (B, 3, H, W)."""
    return normalise(torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2), IMAGENET_MEAN, IMAGENET_STD)


def _check_heads(heads: tuple[int, ...] | None, layers: list[LayerAttention]) -> None:
    most = max(attention.rows.shape[1] for attention in layers)
    if wrong := [head for head in heads or () if not 0 <= head < most]:
        raise ValueError(f"heads={wrong}: expected heads from 0 to {most - 1}")
