"""Projection heads of a self-distillation: found by what they are, and observed as they receive a backbone's result."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from attn_monitor.capture.observe.isolation import all_modules, is_isolated
from attn_monitor.measure.prototypes import (
    COMPARED,
    STUDENT_TEMPERATURE,
    TEACHER_TEMPERATURE,
    Assignments,
    assign,
    evenly_spaced,
)
from attn_monitor.train.role_features import RoleFeatures
from attn_monitor.train.weak_hooks import is_recomputed

MAX_IMAGES = 64  # of a forward
MAX_HEADS = 16
CHANNELS = 8  # by which a row is recognised
ROUNDING = 1e-6  # of a channel of a row at unit length


@dataclass(frozen=True)
class Head:
    """A module that ends in the widest of its linear layers, wider than all others."""

    module: nn.Module
    last: nn.Linear


@dataclass(frozen=True)
class HeadSums:
    """Sums of one role's assignments in one forward, with what goes with them."""

    step: int
    role: str
    sums: Assignments
    centre_norm: Tensor | None


class HeadFeatures:
    """Sum what one head returns for the global features of each role; a forward hook calls `ran`.

    Which role's features enter is found by their values, so that a head of patches counts for none.

    Args:
        head: the head.
        roles: the backbones' features.
        centres: buffers that may be the centre of its outputs.
    """

    def __init__(self, head: Head, roles: Sequence[RoleFeatures], centres: Sequence[Tensor]) -> None:
        self.head, self._roles, self._centres = head, roles, centres
        self.error: Exception | None = None  # of the hook
        self.parts: deque[HeadSums] = deque(maxlen=64)
        self.weight: Tensor | None = None  # some rows of the last layer

    def begin(self, since: int) -> None:
        """Begin a batch; drop entries of steps before ``since``."""
        while self.parts and self.parts[0].step < since:
            self.parts.popleft()

    def take_weight(self) -> Tensor | None:
        """Return some rows of the last layer, as they were when it first ran since the last call."""
        weight, self.weight = self.weight, None
        return weight

    def ran(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Add what a forward has returned for the images whose global features entered."""
        if is_isolated() or is_recomputed():
            return
        results = [t for t in pytree.tree_leaves(output) if _is_plain(t) and t.shape[-1] == self.head.last.out_features]
        entered = [t for t in pytree.tree_leaves([*args, kwargs]) if _is_plain(t)]
        if not results or not entered:
            return
        with torch.no_grad():
            outputs = results[0].detach().as_subclass(Tensor).flatten(0, -2)
            for role in self._roles:
                rows = role.of_batch()
                x = next((t for t in entered if rows is not None and t.shape[-1] == rows.shape[1]), None)
                if rows is None or x is None or x.numel() // x.shape[-1] != len(outputs):
                    continue
                x = evenly_spaced(x.detach().as_subclass(Tensor).flatten(0, -2), MAX_IMAGES)
                self._add(role, evenly_spaced(outputs, MAX_IMAGES), _are_among(x, rows))
            self.weight = _rows_of(self.head.last) if self.weight is None else self.weight

    def _add(self, role: RoleFeatures, outputs: Tensor, valid: Tensor) -> None:
        teaches = role.role.endswith("teacher")
        k, temperature = outputs.shape[-1], TEACHER_TEMPERATURE if teaches else STUDENT_TEMPERATURE
        centre = next((c for c in self._centres if teaches and c.numel() == k and c.device == outputs.device), None)
        norm = None if centre is None else centre.detach().float().norm()
        sums = assign(outputs, valid, temperature, None if centre is None else centre.flatten())
        self.parts.append(HeadSums(role.step, role.role, sums, norm))


def find_heads(around: Iterable[nn.Module], backbones: Iterable[nn.Module]) -> list[Head]:
    """Find modules beside the backbones that end in their widest linear layer, and that feed no other layer.

    Args:
        around: the modules that hold everything, such as a LightningModule.
        backbones: what is not searched.
    """
    inside = {m for backbone in backbones for m in all_modules(backbone)}
    found, fed_on = dict[nn.Module, Head](), _fed_on(around, inside)
    for module in (m for outer in around for m in outer.modules()):
        parts = list(module.modules())  # in the order in which they were registered, the module first
        if module in found or not inside.isdisjoint(parts):
            continue
        linear = [m for m in parts if isinstance(m, nn.Linear)]
        others = [m.out_features for m in linear[:-1]] or [m.in_features for m in linear]
        if linear and linear[-1] not in fed_on and linear[-1].out_features > max(others):
            found[module] = Head(module, linear[-1])
    return list(found.values())[:MAX_HEADS]


def _fed_on(around: Iterable[nn.Module], inside: set[nn.Module]) -> set[nn.Module]:
    """Return linear layers that another one of the same module follows, so that their channels are no prototypes.

    One that takes as many channels as they do is beside them: a head for patches, say.
    """
    found = set[nn.Module]()
    for module in (m for outer in around for m in outer.modules()):
        parts = list(module.modules())
        if isinstance(module, (nn.ModuleDict, nn.ModuleList)) or not inside.isdisjoint(parts):
            continue
        for one, after in itertools.pairwise(m for m in parts if isinstance(m, nn.Linear)):
            if after.in_features == one.out_features:
                found.add(one)
    return found


def find_centres(around: Iterable[nn.Module], backbones: Iterable[nn.Module], widths: set[int]) -> list[Tensor]:
    """Find buffers of shape (1, K) or (1, 1, K) for one of these widths K, beside the backbones."""
    inside = {m for backbone in backbones for m in all_modules(backbone)}
    modules = dict.fromkeys(m for outer in around for m in all_modules(outer) if m not in inside)
    buffers = [buffer for m in modules for buffer in m._buffers.values() if _is_plain(buffer)]
    return [b for b in buffers if b is not None and b.numel() == b.shape[-1] and b.shape[-1] in widths]


def _are_among(rows: Tensor, known: Tensor) -> Tensor:
    """Whether each row is one of the known ones, as it is or at unit length, by some of its channels, bool (n,)."""
    stride = max(1, known.shape[1] // CHANNELS)
    unit = nn.functional.normalize(known.float(), dim=-1)
    some, of_known, of_unit = (t[:, ::stride][:, :CHANNELS] for t in (rows, known, unit))
    same = (some[:, None] == of_known.to(some.dtype)[None]).all(-1)
    near = ((some.float()[:, None] - of_unit[None]).abs() < ROUNDING).all(-1)
    return (same | near).any(1)


def _rows_of(last: nn.Linear) -> Tensor | None:
    """Copy some evenly spaced rows of a linear layer's weight, of its direction where its length is held apart."""
    parametrised = last._modules.get("parametrizations")
    weight: Any = getattr(last, "weight_v", None)
    if parametrised is not None and weight is None:
        weight = getattr(getattr(parametrised, "weight", None), "original1", None)
    weight = getattr(last, "weight", None) if weight is None else weight
    whole = (last.out_features, last.in_features)
    if not _is_plain(weight) or tuple(weight.shape) != whole:  # such as a shard
        return None
    return evenly_spaced(weight.detach().as_subclass(Tensor), COMPARED).clone()


def _is_plain(tensor: Any) -> bool:
    is_one = isinstance(tensor, Tensor) and tensor.ndim >= 2 and tensor.is_floating_point()
    return is_one and not hasattr(tensor, "to_local")
