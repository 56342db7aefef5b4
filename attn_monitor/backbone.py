"""Find the vision transformers in a module tree and name their roles: student, teacher, or a single backbone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from torch import nn

from attn_monitor.errors import NoAttentionError

TEACHER = re.compile(r"teacher|momentum|ema|target|key")
STUDENT = re.compile(r"student|online|query|anchor")


class TargetError(ValueError):
    """``targets`` names something that is no submodule."""


def find_backbones(module: nn.Module) -> dict[str, str]:
    """Role to dotted path, such as ``{"student": "student.backbone", "teacher": "teacher.backbone"}``.

    A backbone is the smallest module that holds a patch embedding and attention. Roles are read from the words in its
    path (teacher, momentum, ema, target; student, online, anchor); one unnamed backbone beside a named one takes the
    other role, and one alone is called "backbone". A module reachable by two names counts once, by its first name.

    Raises `NoAttentionError`, listing what was looked at, when there is none.
    """
    named = list(module.named_modules())
    attention = [path for path, m in named if _is_attention(path, m)]
    holders = {_holder(path, attention) for path, m in named if _embeds_patches(path, m)} - {None}
    paths = [p for p, _ in named if p in holders and not any(q != p and _inside(str(q), p) for q in holders)]
    if not paths:
        children = ", ".join(f"{n} ({type(m).__name__})" for n, m in module.named_children()) or "no submodules"
        if not attention and any(_convolves(m) for _, m in named):
            raise NoAttentionError(
                f"{type(module).__name__} holds no attention: it is a convolutional network ({children}), and has no "
                "maps to show"
            )
        raise NoAttentionError(
            f"no vision transformer was found in {type(module).__name__}. Looked at {children} for a module that holds "
            "both a patch embedding and attention. Name it yourself: targets={'student': 'path.of.the.backbone'}"
        )
    return _name_roles(paths)


def _inside(path: str, ancestor: str) -> bool:
    return ancestor == "" or path.startswith(f"{ancestor}.")


def _holder(patch_embedding: str, attention: list[str]) -> str | None:
    """The closest module above a patch embedding with attention below it."""
    path = patch_embedding
    while path:
        path = path.rpartition(".")[0]
        if any(_inside(a, path) for a in attention):
            return path
    return None


def _embeds_patches(name: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        kernel, stride = tuple(module.kernel_size), tuple(module.stride)
        return kernel == stride and max(kernel) > 1
    return bool(re.search(r"patch|^embeds$", name.rpartition(".")[2].lower())) and _has_parameters(module)


def _convolves(module: nn.Module) -> bool:
    """Whether it is a convolution over overlapping places, as patch embeddings are not."""
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and module.kernel_size != module.stride


def _is_attention(name: str, module: nn.Module) -> bool:
    words = f"{type(module).__name__} {name.rpartition('.')[2]}".lower()
    return bool(re.search(r"att(entio)?n|qkv", words)) and _has_parameters(module)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _name_roles(paths: list[str]) -> dict[str, str]:
    roles: dict[str, str] = {}
    unnamed = []
    for path in paths:
        role = _role(path)
        if role is None:
            unnamed.append(path)
        else:
            roles[role if role not in roles else path] = path
    if len(unnamed) == 1:
        other = "student" if "teacher" in roles else "teacher" if "student" in roles else "backbone"
        if other not in roles:
            roles[other] = unnamed.pop()
    roles.update({path: path for path in unnamed})
    order = {"student": 0, "backbone": 0, "teacher": 1}
    return dict(sorted(roles.items(), key=lambda item: order.get(item[0], 2)))


def _role(path: str) -> str | None:
    """Role by the first word in the path that tells one; an additional teacher keeps its own name."""
    for part in path.lower().split("."):
        if TEACHER.search(part):
            extra = re.match(r"(\w+?)_teacher", part)
            return f"{extra[1]}_teacher" if extra and extra[1] not in ("model", "ema") else "teacher"
        if STUDENT.search(part):
            return "student"
    return None


def resolve_targets(module: nn.Module, targets: Mapping[str, str] | None) -> dict[str, nn.Module]:
    """Role to module, found by `find_backbones` unless ``targets`` says role to path."""
    known = dict(module.named_modules())
    if targets is None:
        return {role: known[path] for role, path in find_backbones(module).items()}
    if not targets:
        raise TargetError("targets={}: expected at least one role, such as {'backbone': 'encoder'}, or None to search")
    for role, path in targets.items():
        if path not in known:
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.4)
            hint = (
                f"; did you mean {near[0]!r}?"
                if near
                else f"; it has {', '.join(n for n, _ in module.named_children())}"
            )
            raise TargetError(f"targets[{role!r}]={path!r} is not a submodule of {type(module).__name__}{hint}")
    return {role: known[path] for role, path in targets.items()}
