"""Find parameters and buffers that could be tokens (CLS, registers, a probe), by how a forward uses them.

Each candidate costs one forward in which it is changed. Parameters that scale, shift or project the image's tokens are
no candidates: that of a token is expanded, concatenated, looked up or projected itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from attn_monitor.capture.observe.isolation import may_be_sharded
from attn_monitor.capture.observe.memory import place_of

_LARGEST, _MOST = 65536, 8
_BESIDE = ("cat", "stack", "copy", "where", "masked", "index", "slice", "select", "scatter", "expand", "repeat")
_LOOKUP = ("embedding", "index.Tensor", "index_select")
_WITH_WEIGHTS = {"mm": 0, "bmm": 0, "convolution": 0, "linear": 0, "addmm": 1, "baddbmm": 1}  # index of the data
_CLASS_NAME, _REGISTER_NAME = re.compile(r"cls|class"), re.compile(r"\bregs?\b|reg_|register|storage")
_OTHER_NAME = re.compile(r"(?:^|\.)(?:prompt|pad|sep|mask|null|query)[^.]*(?:\.weight|\.original\d*)?$")


class TokenParameter(NamedTuple):
    """Identify a parameter or buffer by its module, its name there, and its path in the model."""

    module: nn.Module
    name: str
    path: str

    @property
    def tensor(self) -> Tensor | None:
        """Return the current tensor; under FSDP it is another one than before the forward."""
        found = getattr(self.module, self.name, None)
        return found if isinstance(found, Tensor) else None

    @property
    def is_class(self) -> bool:
        """Check the name for a class token; names decide only between parameters that behave as tokens."""
        return _CLASS_NAME.search(self.path) is not None and not self.is_register

    @property
    def is_register(self) -> bool:
        """Check the name for a register."""
        return _REGISTER_NAME.search(self.path) is not None

    @property
    def is_no_class(self) -> bool:
        """Check the name for a token that is no class token: a register, a prompt, a mask token, padding, …."""
        return self.is_register or (not self.is_class and _OTHER_NAME.search(self.path) is not None)


class ParameterUses:
    """Collect how the operations of a forward on ``batch`` images use small parameters."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.batch = batch
        self._sharded = may_be_sharded()  # an FSDP unit around the model counts too
        self._small = list(_small(model, self._sharded))
        self._at: dict[tuple[int, int], TokenParameter] = {}
        self._used: dict[str, TokenParameter] = {}
        self._excluded: set[str] = set()
        self._tables: set[str] = set()
        self._locate()

    @property
    def tokens(self) -> list[TokenParameter]:
        """Return the parameters that may be tokens, at most ``_MOST``, class tokens by name first, then registers."""
        found = [p for path, p in self._used.items() if path not in self._excluded]
        if any(p.is_class and p.path not in self._tables for p in found):  # then the row of a table is a label
            found = [p for p in found if p.path not in self._tables]
        return sorted(found, key=lambda p: (not p.is_class, not p.is_register))[:_MOST]

    def note(self, func: Any, args: Sequence[Any]) -> None:
        """Record how one operation uses small parameters."""
        operands = [x for a in args for x in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(x, Tensor)]
        for operand in operands:
            if operand.numel() > _LARGEST:
                continue
            found = self._find(operand)
            if found is not None:
                self._used[found.path] = found
                name = str(func).removeprefix("aten.")
                if name.startswith(_LOOKUP):
                    self._tables.add(found.path)
                if not self._may_be_token(name, operand, args, operands):
                    self._excluded.add(found.path)

    def _locate(self) -> None:
        for parameter in self._small:
            tensor = parameter.tensor
            if tensor is not None and (place := place_of(tensor)) is not None:
                self._at[place] = parameter

    def _find(self, operand: Tensor) -> TokenParameter | None:
        place = place_of(operand)
        if place not in self._at and (self._sharded or isinstance(operand, nn.Parameter)):
            self._locate()  # FSDP may have gathered it since
        found = None if place is None else self._at.get(place)
        now = None if found is None else found.tensor
        return found if now is not None and now.numel() == operand.numel() else None

    def _may_be_token(self, name: str, operand: Tensor, args: Sequence[Any], operands: Sequence[Tensor]) -> bool:
        data = next((at for op, at in _WITH_WEIGHTS.items() if name.startswith(f"{op}.")), None)
        data = 0 if data is None and "norm" in name else data
        if data is not None:
            return args[data] is operand
        if name.startswith(_LOOKUP):  # all rows of a table, or one for each image; a few of a larger one are no token
            rows, asked = len(operand), next((x for x in operands if not x.is_floating_point()), None)
            return asked is not None and asked.numel() in (rows, rows * self.batch, 1, self.batch)
        if name.startswith(_BESIDE):
            return operand.ndim > 1 or not name.startswith("cat")  # biases of q, k and v are concatenated too
        return all(other.numel() <= operand.numel() for other in operands)


def _small(model: nn.Module, sharded: bool) -> Iterator[TokenParameter]:
    """Iterate over small tensors; under FSDP over all, as sizes before the forward, even 0, are not the final ones."""
    for path, module in model.named_modules():
        for found in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            for name, tensor in found:
                if tensor is None or not tensor.is_floating_point():
                    continue
                if sharded or 1 < tensor.numel() <= _LARGEST:
                    yield TokenParameter(module, name, f"{path}.{name}" if path else name)
