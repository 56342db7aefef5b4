"""`RoleFeatures`: copies of what one backbone returns in training, a row for each image, of the latest few steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from attn_monitor.capture.observe.isolation import is_isolated
from attn_monitor.train.batch_images import MAX_CHANNELS
from attn_monitor.train.weak_hooks import is_recomputed

MAX_ROWS = 4096  # of features that are kept
MARKED = 8  # pixels by which an image is recognised


@dataclass(frozen=True)
class FeatureRows:
    """Rows that one forward returned.

    Args:
        step: optimizer steps done.
        batch: number of the batch.
        rows: (B, D) on the model's device.
        marks: a few pixels of each image as it entered the model, (B, 8).
    """

    step: int
    batch: int
    rows: Tensor
    marks: Tensor


class RoleFeatures:
    """Keep the global features of one role's backbone, of its largest images; a forward hook calls `ran`.

    Args:
        role: name of the role.
        first_is_cls: whether the first of several tokens is known to be the CLS token.
    """

    def __init__(self, role: str, first_is_cls: bool) -> None:
        self.role, self.first_is_cls = role, first_is_cls
        self.error: Exception | None = None  # of the hook
        self.unread = ""  # why the latest result could not be read
        self.chunks: deque[FeatureRows] = deque()
        self.step = self.batch = 0
        self._pixels = 0  # of the largest images so far

    def begin(self, step: int, batch: int, since: int) -> None:
        """Begin a batch; drop rows of steps before ``since``."""
        self.step, self.batch = step, batch
        while self.chunks and self.chunks[0].step < since:
            self.chunks.popleft()

    def ran(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Copy the features that a forward has returned, unless it was of smaller images, or of our own."""
        if is_isolated() or is_recomputed():
            return
        with torch.no_grad():
            images, output = _largest(args, kwargs, output)
            if images is None:
                self.unread = "no images (batch, channels, height, width), clips, volumes or spectrograms enter it"
                return
            pixels = images.shape[-2] * images.shape[-1]
            if pixels < self._pixels:
                return
            rows = global_rows(output, len(images), first_is_cls=self.first_is_cls)
            if rows is None:
                self.unread = f"its result, {_described(output)}, holds no features of whole images"
                return
            if pixels > self._pixels or (self.chunks and self.chunks[0].rows.shape[1] != rows.shape[1]):
                self.chunks.clear()
            self._pixels, self.unread = pixels, ""
            self.chunks.append(FeatureRows(self.step, self.batch, rows[:MAX_ROWS].clone(), marks_of(images)[:MAX_ROWS]))
            while sum(len(chunk.rows) for chunk in self.chunks) > MAX_ROWS:
                self.chunks.popleft()

    def of_batch(self) -> Tensor | None:
        """Return the rows of the present batch so far, None if there are none."""
        rows = [chunk.rows for chunk in self.chunks if chunk.batch == self.batch]
        return torch.cat(rows) if rows else None


def global_rows(output: Any, images: int, *, first_is_cls: bool) -> Tensor | None:
    """Read a row for each image from a backbone's result.

    The first tensor (B, D) of the result counts; without one, the CLS token of the first (B, T, D), or the mean of its
    tokens if the first of them is not known to be CLS; else the mean of the first map (B, D, h, w). A result with a
    single number holds a loss, and so comes from more than a backbone. Where some tensors need gradients, others are
    masks and the like.

    Args:
        output: a tensor, or a tuple, list, mapping or data class that holds some.
        images: their number, B.
        first_is_cls: whether the first token is the CLS token.

    Returns:
        (B, D), without gradients; None if nothing of these kinds is in the result.
    """
    parts = [t for t in _tensors(output) if t.is_floating_point()]
    if any(t.ndim == 0 for t in parts):
        return None
    parts = [t.detach() for t in parts if t.requires_grad] or parts
    fitting = [t for t in parts if len(t) == images and min(t.shape) > 0 and not hasattr(t, "to_local")]
    for dimensions in (2, 3, 4):
        for tensor in fitting:
            if tensor.ndim == dimensions and tensor.shape[2 if dimensions == 3 else 1] > 1:
                tensor = tensor.as_subclass(Tensor)
                if dimensions == 3:
                    return tensor[:, 0] if first_is_cls else tensor.mean(1)
                return tensor if dimensions == 2 else tensor.mean((2, 3))
    return None


def marks_of(images: Tensor) -> Tensor:
    """Copy a few evenly spaced pixels of each image, (B, 8), which distinguish it from others."""
    flat = images.detach().as_subclass(Tensor).flatten(1)
    stride = max(1, flat.shape[1] // MARKED)
    return flat[:, stride // 2 :: stride][:, :MARKED].clone()


def images_in(container: Any) -> list[Tensor]:
    """Return all tensors of images in a container; where there are none, all spectrograms or signals."""
    leaves = pytree.tree_leaves(container)
    return [t for t in leaves if _are_images(t)] or [t for t in leaves if _are_spectrograms(t)]


def _largest(args: Any, kwargs: Any, output: Any) -> tuple[Tensor | None, Any]:
    """Return the largest images that entered, and the part of the result that is of them."""
    entered = images_in([*args, kwargs])
    if not entered:
        return None, output
    index = max(range(len(entered)), key=lambda i: entered[i].shape[-2] * entered[i].shape[-1])
    one_each = len(entered) > 1 and isinstance(output, (list, tuple)) and len(output) == len(entered)
    return entered[index], output[index] if one_each else output


def _are_images(tensor: Any) -> bool:
    """Whether an argument is (B, C, H, W), or a clip or a volume, (B, C, T, H, W) or (B, T, C, H, W)."""
    is_one = isinstance(tensor, Tensor) and tensor.ndim in (4, 5) and tensor.is_floating_point()
    return is_one and 0 < min(tensor.shape[1:-2]) <= MAX_CHANNELS and not hasattr(tensor, "to_local")


def _are_spectrograms(tensor: Any) -> bool:
    """Whether an argument is (B, F, T), (B, T, F) or (B, C, T)."""
    is_one = isinstance(tensor, Tensor) and tensor.ndim == 3 and tensor.is_floating_point()
    return is_one and 0 not in tensor.shape and not hasattr(tensor, "to_local")


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a result, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):  # also the outputs of Hugging Face's models
        return _tensors(list(output.values()))
    if is_dataclass(output) and not isinstance(output, type):
        return _tensors([getattr(output, field.name) for field in fields(output)])
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _described(output: Any) -> str:
    shapes = [f"{tuple(t.shape)}" for t in _tensors(output)]
    return f"{type(output).__name__} of {', '.join(shapes[:4]) or 'no tensors'}" if shapes else type(output).__name__
