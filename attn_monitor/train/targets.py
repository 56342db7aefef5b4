"""`Targets`: the models to watch, which are found at each use; `SnapshotRequest`: a snapshot of them to take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from attn_monitor.errors import ArgumentError

NO_TEACHER = "no teacher was found; name it by {}"


class Targets(NamedTuple):
    """Hold the watched models by role, and their paths for messages."""

    models: Mapping[str, nn.Module]
    paths: Mapping[str, str]
    note: str = ""  # what was not found


FindTargets = Callable[[], AbstractContextManager[Targets]]
"""A context manager that finds the models at each use, as modules may be replaced, in the run's precision."""


@dataclass(frozen=True)
class SnapshotRequest:
    """A snapshot to take.

    Args:
        targets: finds the models.
        step: optimizer steps done.
        epoch: from 0 on.
        batch: what the next step receives.
        last: whether the run ends with this snapshot.
        wait: whether to wait for global features that are not known yet; else they are added to what is written.
    """

    targets: FindTargets
    step: int
    epoch: int
    batch: Any = None
    last: bool = False
    wait: bool = False


def check_targets(targets: Any) -> Mapping[str, str] | None:
    """Return ``targets`` if it maps roles to paths of modules, or is None; raise `ArgumentError` otherwise."""
    if targets is None:
        return None
    expected = "expected role to path of a module, such as {'student': 'student.backbone'}, or None to search"
    if not isinstance(targets, Mapping) or not targets:
        raise ArgumentError(f"targets={targets!r}: {expected}")
    for role, path in targets.items():
        _check_role("targets", role)
        if not isinstance(path, str):
            raise ArgumentError(f"targets[{role!r}]: received a {type(path).__name__}, {expected}")
    return targets


def check_models(models: Any) -> nn.Module | Mapping[str, nn.Module]:
    """Return ``models`` if it is a module, or maps roles to modules; raise `ArgumentError` otherwise."""
    if isinstance(models, nn.Module):
        return models
    expected = "expected a module to search for backbones, or role to module, such as {'student': student}"
    if not isinstance(models, Mapping) or not models:
        raise ArgumentError(f"models: received {models if not models else f'a {type(models).__name__}'}, {expected}")
    for role, model in models.items():
        _check_role("models", role)
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"models[{role!r}]: received a {type(model).__name__}, {expected}")
    return models


def _check_role(argument: str, role: Any) -> None:
    if not isinstance(role, str) or not re.fullmatch(r"[\w.+-]+", role):
        raise ArgumentError(
            f"{argument}: received the role {role!r}, expected letters, digits, '_', '.', '+' or '-', as it becomes "
            "part of tags"
        )
