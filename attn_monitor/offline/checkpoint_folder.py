"""Checkpoints of one run: which files they are, at which step each was saved, and which roles' weights it holds."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_monitor.capture.backbones import name_roles, role_of
from attn_monitor.errors import CheckpointError
from attn_monitor.offline.safe_unpickling import unpickle_data
from attn_monitor.offline.sharded_weights import METADATA
from attn_monitor.offline.weight_files import read_weights

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
        raise FileNotFoundError(
            f"{folder}: no checkpoints here; expected files that end in {', '.join(sorted(ENDINGS))}, or folders of "
            "sharded checkpoints or of safetensors"
        )
    return sorted(found)


def read_checkpoint(path: Path) -> Checkpoint:
    """Look at a checkpoint without keeping its weights; `CheckpointError` where it cannot be read or has no step."""
    names = tuple(read_weights(path).shapes)
    of_run = path / LIGHTNING if path.is_dir() else path
    stored = unpickle_data(of_run, mmap=True)[0] if of_run.is_file() and zipfile.is_zipfile(of_run) else None
    facts = stored if isinstance(stored, Mapping) else {}
    step, epoch = _steps_done(facts), facts.get("epoch")
    return Checkpoint(path, step_in_name(path) if step is None else step, epoch if isinstance(epoch, int) else 0, names)


def step_in_name(path: Path) -> int:
    """The number after "step" or "iter" in a file's name or in its folder's, else the last number before its ending."""
    for name in (path.name.partition(".")[0], path.parent.name if path.name == HUGGING_FACE else ""):
        told = re.findall(r"(?:step|iter|iteration)s?[=_-]?(\d{1,18})", name) or re.findall(r"\d{1,18}", name)
        if told:
            return int(told[-1])
    raise CheckpointError(f"{path}: at which step it was saved is told neither by a global_step in it nor by its name")


def roles_in(checkpoint: Checkpoint, weights: Container[str], key: str | None = None) -> dict[str, str]:
    """Role to the name below which a model's ``weights`` are, such as {"student": "state_dict.student"}.

    These are the places below which the most of them are, or nearly so; whether they fit is for loading to tell.
    ``key``, a role or a part of such names, chooses among the places. Empty where there is none.
    """
    count: Counter[str] = Counter()
    for name in checkpoint.names:
        parts = name.split(".")
        count.update(".".join(parts[:n]) for n in range(len(parts)) if ".".join(parts[n:]) in weights)
    most = max(count.values(), default=0)
    places = [place for place in count if count[place] >= NEARLY * most]
    if key is not None:
        places = [place for place in places if f".{key.strip('.')}." in f".{place}." or role_of(place) == key]
    return name_roles(places)


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
