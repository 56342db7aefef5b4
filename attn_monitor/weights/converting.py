"""Weights made to fit a model: renamed by the rules of its library, position embeddings resized to its grid."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_monitor.capture.observe.memory import place_of

POSITIONS = re.compile(r"pos(ition(al)?)?_emb")
MOST_PREFIX_TOKENS = 16  # CLS, distillation, registers


@dataclass(frozen=True)
class Converted:
    """Tensors by the model's own names, and notes on how they were made."""

    tensors: Mapping[str, Tensor]
    notes: list[str]


def convert(model: nn.Module, tensors: Mapping[str, Tensor]) -> Converted | None:
    """Rename tensors by the rules of the model's library, such as timm's for DINOv2 with registers.

    Returns:
        The tensors that have a name in the model; None where the library has no rules, or they fail on these tensors.
    """
    library = type(model).__module__.partition(".")[0]
    rules = {"timm": _by_timm, "transformers": _by_transformers}.get(library)
    if rules is None:
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints each bias that it leaves out
            converted, left_out = rules(model, dict(tensors))
    except Exception:  # of weights of another model: the caller reports what is missing
        return None
    notes = [f"renamed by the rules of {library}"]
    for name, tensor in converted.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            notes.append(f"changed by them: {name} from {tuple(tensors[name].shape)} to {tuple(tensor.shape)}")
    if left_out:
        notes.append(f"left out by them: {shortened(left_out)}")
    return Converted(converted, notes)


def shortened(names: Sequence[str], most: int = 6) -> str:
    """Join the first names of many."""
    return ", ".join([*names[:most]] + ["…"] * (len(names) > most))


def _by_timm(model: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors by new name, and the old names of those that have none."""
    rules = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rules is None:
        return {}, list(tensors)
    converted = rules(dict(tensors), model)
    taken = {place_of(tensor) for tensor in converted.values()}  # under another name
    lost = [n for n, t in tensors.items() if n not in converted and place_of(t) not in taken]
    return converted, [name for name in lost if tensors[name].any()]  # a bias of zeros has no effect


def _by_transformers(model: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors by new name, and the old names of those that have none."""
    made, info = type(model).from_pretrained(None, config=model.config, state_dict=tensors, output_loading_info=True)
    found = {name: tensor for name, tensor in made.state_dict().items() if name not in info["missing_keys"]}
    return found, sorted(info["unexpected_keys"])


@dataclass(frozen=True)
class Resize:
    """From how many rows and columns of patches to how many, behind tokens that have no place in the image."""

    prefix_tokens: int
    old: tuple[int, int]
    new: tuple[int, int]

    def __str__(self) -> str:
        return f"from {self.old[0]} × {self.old[1]} to {self.new[0]} × {self.new[1]} patches"

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Interpolate (..., tokens, width) as timm's `resample_abs_pos_embed` does: bicubic with antialiasing."""
        prefix, patches = embeddings[..., : self.prefix_tokens, :], embeddings[..., self.prefix_tokens :, :]
        image = patches.float().reshape(1, *self.old, -1).permute(0, 3, 1, 2)  # (1, width, rows, columns)
        image = F.interpolate(image, size=self.new, mode="bicubic", antialias=True)
        patches = image.permute(0, 2, 3, 1).reshape(*embeddings.shape[:-2], -1, embeddings.shape[-1])
        return torch.cat([prefix, patches.to(prefix.dtype)], dim=-2)


def find_resize(model: nn.Module, name: str, old: torch.Size, new: torch.Size) -> Resize | None:
    """Find how position embeddings of shape ``old``, ([1,] tokens, width), become those of shape ``new``.

    Grids are square, unless a module of the model has another ``grid_size``. None where these are no such embeddings.
    """
    if not POSITIONS.search(name) or len(old) not in (2, 3) or old[:-2] + old[-1:] != new[:-2] + new[-1:]:
        return None
    sizes = (getattr(module, "grid_size", None) for module in model.modules())
    known = next((size for size in sizes if isinstance(size, tuple) and len(size) == 2), None)
    for prefix_tokens in range(min(old[-2], new[-2], MOST_PREFIX_TOKENS + 1)):
        before, after = (_square(tokens - prefix_tokens) for tokens in (old[-2], new[-2]))
        if known is not None and math.prod(known) == new[-2] - prefix_tokens:
            after = known
        if before is not None and after is not None:
            return Resize(prefix_tokens, before, after)
    return None


def _square(patches: int) -> tuple[int, int] | None:
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None
