"""Find the vision transformers in a module tree and name their roles: student, teacher, or a single backbone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from torch import nn

from attn_monitor.errors import NoAttentionError, TargetError

TEACHER = {"teacher", "momentum", "ema", "target", "key"}
STUDENT = {"student", "online", "query", "anchor"}
PARTS = {
    "backbone",
    "encoder",
    "model",
    "net",
    "network",
    "vit",
    "trunk",
    "base",
    "branch",
    "ema",
    "momentum",
    "teacher",
}
"""Words beside "teacher" that say what the module is, and not which of several teachers."""


def find_backbones(module: nn.Module) -> dict[str, str]:
    """Role to dotted path, such as ``{"student": "student.backbone", "teacher": "teacher.backbone"}``.

    A backbone is the smallest module that holds a patch embedding and attention. Roles are read from the words in its
    path (teacher, momentum, ema, target, key; student, online, anchor, query); one unnamed backbone beside a named
    one takes the other role, and one alone is called "backbone". A module reachable by two names counts once, by its
    first name; a teacher may share its patch embedding with the student.

    Raises `NoAttentionError`, listing what was looked at, when there is none.
    """
    named = list(module.named_modules())
    attention = [path for path, m in named if _is_attention(path, m)]
    holders = _holders(module, attention)
    paths = [p for p, _ in named if p in holders and not any(q != p and _inside(q, p) for q in holders)]
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
    return name_roles(paths)


def paths_of_both_roles(module: nn.Module, backbone: nn.Module) -> list[str]:
    """The paths under which a module holds a backbone, or its layers, if it is the teacher by some of them alone."""
    layers = [(name, m) for name, m in backbone.named_modules() if not m._modules and _has_parameters(m)]
    held = []
    for name, layer in (*layers[:1], *layers[-1:]):
        paths = [path for path, m in module.named_modules(remove_duplicate=False) if m is layer]
        held.append([path.removesuffix(name).removesuffix(".") for path in paths if path.endswith(name)])
    both = [path for path in held[0] if path in held[-1]] if held else []
    return both if len(set(map(_is_teacher, both))) == 2 else []


def _is_teacher(path: str) -> bool:
    """By all of its names: an average may hold the model that it is of, as in ``ema.online_model``."""
    roles = [role_of(part) for part in path.split(".")]
    return "teacher" in roles and "student" not in roles


def _inside(path: str, ancestor: str) -> bool:
    return ancestor == "" or path.startswith(f"{ancestor}.")


def _holders(module: nn.Module, attention: list[str]) -> set[str]:
    """Modules around patch embeddings, which others of their class may share; but none that merely refers to one."""
    known = dict(module.named_modules())
    first = {m: path for path, m in known.items()}
    holders = set[str]()
    for path, m in module.named_modules(remove_duplicate=False):
        if _embeds_patches(path, m):
            holder, original = (_holder(p, attention) for p in (path, first[m]))
            if holder is None or original is None or holder not in known:
                continue
            if type(known[holder]) is type(known[original]):
                holders.add(holder)
    return holders


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


def name_roles(paths: list[str]) -> dict[str, str]:
    """Role to path, by the rules of `find_backbones`; students and backbones before teachers."""
    roles: dict[str, str] = {}
    unnamed = []
    for path in paths:
        role = role_of(path)
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


def role_of(path: str) -> str | None:
    """Role by the first name in the path with a word that tells one; an additional teacher keeps its own name.

    Words are whole: there is no "ema" in ``semantic_encoder``. MoCo's encoders end in ``_q`` and ``_k``.
    """
    for part in path.split("."):
        words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", part)]
        ending = words[-1] if len(words) > 1 else ""
        if not TEACHER.isdisjoint(words) or ending == "k":
            which = [word for word in words[:-1] if word not in PARTS] if ending == "teacher" else []
            return "_".join([*which, "teacher"])
        if not STUDENT.isdisjoint(words) or ending == "q":
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
