"""Weights under the names of a model's authors, renamed by the rules of the library that the model is of."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Converted:
    """Tensors by the model's own names, and what is to be told of how they came about."""

    tensors: Mapping[str, Tensor]
    notes: list[str]


def convert(model: nn.Module, tensors: Mapping[str, Tensor]) -> Converted | None:
    """By timm's rules, such as those for DINOv2 with registers, or by those of transformers; None without any."""
    library = type(model).__module__.partition(".")[0]
    rules = {"timm": _by_timm, "transformers": _by_transformers}.get(library)
    if rules is None:
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints there of each bias that it leaves out
            converted, left_out = rules(model, dict(tensors))
    except Exception:  # of weights that the rules are not for: what the model lacks without them is told
        return None
    notes = [f"renamed by the rules of {library}"]
    for name, tensor in converted.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            notes.append(f"changed by them: {name} from {tuple(tensors[name].shape)} to {tuple(tensor.shape)}")
    if left_out:
        notes.append(f"left out by them: {shortened(left_out)}")
    return Converted(converted, notes)


def shortened(names: Sequence[str], most: int = 6) -> str:
    """The first names of many."""
    return ", ".join([*names[:most]] + ["…"] * (len(names) > most))


Renamed = tuple[dict[str, Tensor], list[str]]
"""Tensors by new name, and the old names of those that have none."""


def _by_timm(model: Any, tensors: dict[str, Tensor]) -> Renamed:
    rules = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rules is None:
        return {}, list(tensors)
    converted = rules(dict(tensors), model)
    taken = {tensor.data_ptr() for tensor in converted.values()}  # under another name
    lost = [n for n, t in tensors.items() if n not in converted and t.data_ptr() not in taken]
    return converted, [name for name in lost if tensors[name].any()]  # a bias of zeros is none


def _by_transformers(model: Any, tensors: dict[str, Tensor]) -> Renamed:
    made, told = type(model).from_pretrained(None, config=model.config, state_dict=tensors, output_loading_info=True)
    found = {name: tensor for name, tensor in made.state_dict().items() if name not in told["missing_keys"]}
    return found, sorted(told["unexpected_keys"])
