"""Choose and sample weights of a student and its teacher: views of a few values, copied on their device."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.memory import place_of
from attn_monitor.capture.role_names import role_of
from attn_monitor.measure.ema_steps import Sampled

LENGTH = 32  # values per sampled parameter
SCALES, VECTORS, MATRICES, BUFFERS = 3, 4, 5, 3  # number of sampled tensors of each kind
ALIKE = 0.9  # share of parameters that must exist in both models
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Pair(NamedTuple):
    """Hold tensors of the student, and the teacher's of the same names."""

    student: list[Tensor]
    teacher: list[Tensor]

    def sample(self) -> tuple[Tensor, Tensor]:
        """Copy values of each model, (N,) on its device; of sharded tensors, the part of this process."""
        with torch.no_grad():
            return _copied(self.student), _copied(self.teacher)


@dataclass(frozen=True)
class WeightSamples:
    """Hold the names of the sampled parameters and buffers of a student and a teacher of one architecture."""

    student: nn.Module
    teacher: nn.Module
    names: tuple[str, ...]
    buffers: tuple[str, ...]

    @classmethod
    def of(cls, student: nn.Module, teacher: nn.Module) -> WeightSamples | None:
        """Choose samples evenly over the depth, of trained parameters if there are any; None if the models differ."""
        ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
        common = [n for n, p in ours.items() if n in theirs and _comparable(p, theirs[n])]
        if not common or len(common) < ALIKE * max(len(ours), len(theirs)):
            return None
        common = [n for n in common if theirs[n] is not ours[n]] or common  # some parameters may be shared
        common = [n for n in common if ours[n].requires_grad] or common
        common = [n for n in common if ours[n].device == ours[common[0]].device]  # a model may be on several devices
        scales = [n for n in common if ours[n].ndim == 1 and n.endswith("weight")]
        vectors = [n for n in common if ours[n].ndim == 1 and n not in scales]
        matrices = [n for n in common if ours[n].ndim > 1]
        names = *_spread(scales, SCALES), *_spread(vectors, VECTORS), *_spread(matrices, MATRICES)
        return cls(student, teacher, names, tuple(_spread(_buffers_in_common(student, teacher), BUFFERS)))

    def are_there(self) -> bool:
        """Whether both models still have the sampled tensors, as training may remove blocks."""
        names = (*self.names, *self.buffers)
        return all(_at(model, name) is not None for model in (self.student, self.teacher) for name in names)

    def parameters(self) -> Pair:
        """Return the sampled parameters that the models have now."""
        return self._find(self.names)

    def sample_of_buffers(self) -> tuple[Tensor, Tensor]:
        """Copy values of both models' buffers, (N,) each; empty if there are none to average."""
        return self._find(self.buffers).sample()

    def described(self, pair: Pair) -> Sampled:
        """Describe the values of a sample: their precision, and the slices that are scales of a normalisation."""
        lengths = [len(_some(p)) for p in pair.teacher]
        precision = [torch.full((n,), torch.finfo(p.dtype).eps) for n, p in zip(lengths, pair.teacher, strict=True)]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        parts = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
        scales = [
            part
            for part, p, name in zip(parts, pair.student, self.names, strict=True)
            if p.ndim == 1 and name.endswith("weight") and part.stop - part.start > 1
        ]
        return Sampled(torch.cat(precision).double(), tuple(scales), next(iter(self.buffers), ""))

    def sharing_memory(self) -> tuple[int, int]:
        """Count the trained parameters that both models hold in the same memory, and all trained parameters."""
        theirs = dict(self.teacher.named_parameters())
        ours = {n: p for n, p in self.student.named_parameters() if p.requires_grad and n in theirs}
        return sum(_is_shared(p, theirs[n]) for n, p in ours.items()), len(ours)

    def _find(self, names: Iterable[str]) -> Pair:
        found = [[_at(model, name) for name in names] for model in (self.student, self.teacher)]
        return Pair(*([p for p in parameters if p is not None] for parameters in found))


def student_and_teacher(models: Mapping[str, nn.Module]) -> tuple[nn.Module, nn.Module] | None:
    """Find student and teacher by role, else by words in it; None without exactly one of each.

    A backbone beside a teacher is the student.
    """
    found = []
    for wanted, also in (("student", "backbone"), ("teacher", "teacher")):
        named = [model for role, model in models.items() if role_of(role) == wanted or role == also]
        if wanted in models:
            named = [models[wanted]]
        if len(named) != 1:
            return None
        found += named
    return found[0], found[1]


def random_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find modules that are random in training mode (dropout, stochastic depth, …), by name with their class."""
    return {f"{name} ({type(m).__name__})": m for name, m in model.named_modules() if _is_random(m)}


def _is_random(module: nn.Module) -> bool:
    drops = re.search(r"drop|stochastic", type(module).__name__.lower()) is not None
    return any(
        isinstance(value, float) and 0 < value <= 1 and ("drop" in name or (drops and name in ("p", "prob")))
        for name, value in vars(module).items()
    )


def _at(model: nn.Module, path: str) -> Tensor | None:
    """Return the parameter or buffer at a path now, as training may replace it; None if there is none."""
    *owners, name = path.split(".")
    owner: nn.Module | None = model
    for part in owners:
        owner = None if owner is None else owner._modules.get(part)
    return None if owner is None else owner._parameters.get(name, owner._buffers.get(name))


def _comparable(one: Tensor, other: Tensor) -> bool:
    kind = one.shape == other.shape and one.numel() > 0 and one.dtype in FLOATS and other.dtype in FLOATS
    return kind and not one.is_meta and not other.is_meta


def _buffers_in_common(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Name the persistent buffers of both models; others are no part of an EMA."""
    theirs, kept = dict(teacher.named_buffers()), student.state_dict().keys()
    return [n for n, b in student.named_buffers() if n in kept and n in theirs and _comparable(b, theirs[n])]


def _spread(names: Sequence[str], count: int) -> list[str]:
    places = torch.linspace(0, len(names) - 1, min(count, len(names))).round().int().tolist()
    return [names[place] for place in places]


def _copied(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([_some(tensor) for tensor in tensors]) if tensors else torch.empty(0)


def _some(tensor: Tensor) -> Tensor:
    """Return a view of up to `LENGTH` values from the middle, (n,)."""
    values = _local(tensor.detach())
    while values.ndim > 1 and values.numel():
        values = values[len(values) // 2]
    values = values.reshape(-1)
    return values[max(0, (len(values) - LENGTH) // 2) :][:LENGTH]


def _local(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor, and other tensors as they are."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _is_shared(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors start in the same memory; not if there is none here, as after FSDP has freed it."""
    place = place_of(_local(one.detach()))
    return place is not None and place == place_of(_local(other.detach()))
