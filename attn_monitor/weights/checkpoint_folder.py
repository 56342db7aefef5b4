"""Checkpoints of one run: which files they are, at which step each was saved, and the models of each role in them."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from attn_monitor.capture.backbones import name_roles, role_of
from attn_monitor.errors import CheckpointError
from attn_monitor.weights.checkpoints import load_checkpoint
from attn_monitor.weights.sharded_weights import METADATA
from attn_monitor.weights.weight_files import read_pickled, read_weights

ENDINGS = {".ckpt", ".pt", ".pth", ".bin", ".safetensors"}
HUGGING_FACE = "pytorch_model.bin"  # what its Trainer wrote into folders such as checkpoint-500 before safetensors

LIGHTNING = "meta.pt"  # what it puts beside the weights of a sharded checkpoint
NEARLY = 0.9  # of a model's weights: student and teacher may differ in a mask token


@dataclass(frozen=True)
class Checkpoint:
    """A file, its step and epoch, and the names of its tensors, those in nested dictionaries joined by dots."""

    path: Path
    step: int
    epoch: int
    names: tuple[str, ...]


def checkpoint_files(folder: Path) -> list[Path]:
    """Files and folders of weights in a folder; what is one itself is its own list."""
    if folder.is_file() or (folder / METADATA).exists():
        return [folder]
    found = [path for path in folder.glob("*") if path.suffix in ENDINGS and path.is_file()]
    found += [path for path in folder.glob("*") if (path / METADATA).exists() or any(path.glob("*.safetensors"))]
    found += folder.glob(f"*/{HUGGING_FACE}")
    if not found:
        wrong = "no checkpoints here" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{folder}: {wrong}; expected files that end in {', '.join(sorted(ENDINGS))}, or folders of "
            "sharded checkpoints or of safetensors"
        )
    return sorted(found)


def read_checkpoint(path: Path, *, trust: bool = False) -> Checkpoint:
    """Look at a checkpoint without keeping its weights; `CheckpointError` where it cannot be read or has no step."""
    weights, of_run = read_weights(path, trust=trust), path / LIGHTNING
    stored = read_pickled(of_run, trust=trust)[0] if of_run.is_file() else weights.stored
    facts = stored if isinstance(stored, Mapping) else {}
    step, epoch = _steps_done(facts), facts.get("epoch")
    names = tuple(weights.shapes)
    return Checkpoint(path, step_in_name(path) if step is None else step, epoch if isinstance(epoch, int) else 0, names)


def step_in_name(path: Path) -> int:
    """The number after "step" or "iter" in a file's name or in its folder's, else the last number before its ending."""
    for name in (path.name.partition(".")[0], path.parent.name if path.name == HUGGING_FACE else ""):
        told = re.findall(r"(?:step|iter|iteration)s?[=_-]?(\d{1,18})", name) or re.findall(r"\d{1,18}", name)
        if told:
            return int(told[-1])
    raise CheckpointError(f"{path}: at which step it was saved is told neither by a global_step in it nor by its name")


def roles_in(checkpoint: Checkpoint, weights: Collection[str], key: str | None = None) -> dict[str, str]:
    """Role to the name below which a model's ``weights`` are, such as {"student": "state_dict.student"}.

    These are the places below which the most of them are, or nearly so; whether they fit is for loading to tell.
    ``key``, a role or a part of such names, chooses among the places. Empty where there is none.
    """
    count: Counter[str] = Counter()
    deepest = max((name.count(".") for name in weights), default=0) + 1
    for name in checkpoint.names:
        parts = name.split(".")
        starts = range(max(0, len(parts) - deepest), len(parts))
        count.update(".".join(parts[:n]) for n in starts if ".".join(parts[n:]) in weights)
    most = max(count.values(), default=0)
    places = [place for place in count if count[place] >= NEARLY * most]
    if key is not None:
        of_role = name_roles(places).get(key)
        places = [place for place in places if f".{key.strip('.')}." in f".{place}." or role_of(place) == key]
        if not places and of_role is not None:  # known by the other names alone
            return {key: of_role}
    return name_roles(places)


class RoleModels:
    """Models of one kind, one for each role that checkpoints hold; ``choice`` are the options of `load_checkpoint`."""

    def __init__(self, model: nn.Module, tell: Callable[[str], None], key: str | None = None, **choice: Any) -> None:
        self._model, self._tell, self._key, self._choice = model, tell, key, choice
        self._by_role: dict[str, nn.Module] = {}

    def load(self, checkpoint: Checkpoint) -> dict[str, nn.Module]:
        """Role to model with this checkpoint's weights; `CheckpointError` where these do not fit."""
        known = self._model.state_dict()
        places: Mapping[str, str | None] = roles_in(checkpoint, known, self._key) or {"backbone": self._key}
        models = {role: self._by_role.get(role) or copy.deepcopy(self._model) for role in places}
        for role, model in models.items():
            loaded = load_checkpoint(model, str(checkpoint.path), key=places[role], **self._choice)
            if role not in self._by_role:
                self._tell(f"{role}: {loaded}")
        if self._by_role and models.keys() != self._by_role.keys():
            raise CheckpointError(
                f"{checkpoint.path}: holds weights of {', '.join(models)}, and the checkpoints before it of "
                f"{', '.join(self._by_role)}"
            )
        self._by_role = models
        return models


def _steps_done(facts: Mapping[str, Any]) -> int | None:
    """The step of Lightning's loggers when it saved this; None where somebody else did.

    With manual optimization, `global_step` counts each optimizer's steps, and loggers count batches.
    """
    step, loop = facts.get("global_step"), _within(facts, "loops", "fit_loop")
    if _within(loop, "epoch_loop.manual_optimization.optim_step_progress", "total").get("completed"):
        step = _within(loop, "epoch_loop.batch_progress", "total").get("processed", step)
    return step if isinstance(step, int) and step >= 0 else None


def _within(values: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}
