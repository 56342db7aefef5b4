"""The checkpoints that a run has left: their files, the steps at which they were saved, and the roles in them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from attn_monitor.capture.role_names import name_roles, role_of
from attn_monitor.errors import CheckpointError
from attn_monitor.weights.files import SHARDED, read_stored, read_weights
from attn_monitor.weights.loading import count_prefixes, load_checkpoint

ENDINGS = {".ckpt", ".pt", ".pth", ".bin", ".safetensors"}
HUGGING_FACE = "pytorch_model.bin"  # what its Trainer wrote into folders such as checkpoint-500 before safetensors
LIGHTNING = "meta.pt"  # what it puts beside the weights of a sharded checkpoint
NEARLY = 0.9  # of a model's weights: student and teacher may differ in a mask token


@dataclass(frozen=True)
class Checkpoint:
    """A file or folder, its step and epoch, and the names of its tensors, joined by dots where they are nested."""

    path: Path
    step: int
    epoch: int
    names: tuple[str, ...]


def checkpoint_files(folder: Path) -> list[Path]:
    """List the files and folders of weights in a folder, in order of their names.

    A file, and a folder that is a checkpoint itself, is the only entry of its list. Raises FileNotFoundError where
    there are none.
    """
    if folder.is_file() or (folder / SHARDED).exists():
        return [folder]
    found = [path for path in folder.glob("*") if path.suffix in ENDINGS and path.is_file()]
    found += [path for path in folder.glob("*") if (path / SHARDED).exists() or any(path.glob("*.safetensors"))]
    found += folder.glob(f"*/{HUGGING_FACE}")
    if not found:
        wrong = "no checkpoints here" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{folder}: {wrong}; expected files that end in {', '.join(sorted(ENDINGS))}, or folders of "
            "sharded checkpoints or of safetensors"
        )
    return sorted(found)


def read_checkpoint(path: Path, *, trust: bool = False) -> Checkpoint:
    """Look at a checkpoint without keeping its weights.

    Raises:
        CheckpointError: it cannot be read, or neither it nor its name holds a step.
    """
    weights, of_run = read_weights(path, trust=trust), path / LIGHTNING
    stored = read_stored(of_run, trust=trust) if of_run.is_file() else weights.stored
    facts = stored if isinstance(stored, Mapping) else {}
    step, epoch = _steps_done(facts), facts.get("epoch")
    names = tuple(weights.shapes)
    return Checkpoint(path, step_in_name(path) if step is None else step, epoch if isinstance(epoch, int) else 0, names)


def step_in_name(path: Path) -> int:
    """Return the number after "step" or "iter" in a file's or its folder's name, else the last number in it."""
    for name in (path.name.partition(".")[0], path.parent.name if path.name == HUGGING_FACE else ""):
        numbers = re.findall(r"(?:step|iter|iteration)s?[=_-]?(\d{1,18})", name) or re.findall(r"\d{1,18}", name)
        if numbers:
            return int(numbers[-1])
    raise CheckpointError(
        f"{path}: the step at which it was saved is not known: it holds no global_step, and its name no number. "
        "Rename it, such as to step-500.pt"
    )


def roles_in(checkpoint: Checkpoint, weights: Collection[str], key: str | None = None) -> dict[str, str]:
    """Find the roles of a checkpoint, such as {"student": "state_dict.student"}.

    Args:
        checkpoint: the file to look at.
        weights: the names of a model's weights.
        key: a role or a part of a prefix, which chooses among the prefixes.

    Returns:
        Role to the prefix of names below which about all of the weights that any prefix has are found; empty where
        there is none. Whether their shapes fit is checked by `load_checkpoint`.
    """
    count = {prefix.removesuffix("."): number for prefix, number in count_prefixes(checkpoint.names, weights).items()}
    most = max(count.values(), default=0)
    places = [place for place in count if count[place] >= NEARLY * most]
    if key is not None:
        of_role = name_roles(places).get(key)
        places = [place for place in places if f".{key.strip('.')}." in f".{place}." or role_of(place) == key]
        if not places and of_role is not None:  # a role only beside the other prefixes
            return {key: of_role}
    return name_roles(places)


class RoleModels:
    """Models of one kind, one for each role that checkpoints hold.

    Args:
        model: is copied for each role.
        report: takes the report of the first checkpoint's loading.
        key: chooses roles, as in `roles_in`.
        choice: options of `load_checkpoint`.
    """

    def __init__(self, model: nn.Module, report: Callable[[str], None], key: str | None = None, **choice: Any) -> None:
        self._model, self._report, self._key, self._choice = model, report, key, choice
        self._by_role: dict[str, nn.Module] = {}

    def load(self, checkpoint: Checkpoint) -> dict[str, nn.Module]:
        """Return role to model with this checkpoint's weights; raises `CheckpointError` where they do not fit."""
        known = self._model.state_dict()
        places: Mapping[str, str | None] = roles_in(checkpoint, known, self._key) or {"backbone": self._key}
        models = {role: self._by_role.get(role) or copy.deepcopy(self._model) for role in places}
        for role, model in models.items():
            loaded = load_checkpoint(model, str(checkpoint.path), key=places[role], **self._choice)
            if role not in self._by_role:
                self._report(f"{role}: {loaded}")
        if self._by_role and models.keys() != self._by_role.keys():
            raise CheckpointError(
                f"{checkpoint.path}: holds weights of {', '.join(models)}, and the checkpoints before it of "
                f"{', '.join(self._by_role)}"
            )
        self._by_role = models
        return models


def _steps_done(facts: Mapping[str, Any]) -> int | None:
    """Return the step at which Lightning's loggers were when it saved this; None for checkpoints of others.

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
