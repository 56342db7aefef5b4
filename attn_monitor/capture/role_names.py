"""Name the roles of vision transformers, student, teacher or a single backbone, by the words in their paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from attn_monitor.capture.observe.module_paths import words_of

TEACHER = {"teacher", "momentum", "ema", "target", "key"}
STUDENT = {"student", "online", "query", "anchor"}
PARTS = {"backbone", "encoder", "model", "net", "network", "vit", "trunk", "base", "branch"} | {
    *("ema", "momentum", "teacher")
}
"""Words beside "teacher" that name the kind of module, not one of several teachers."""


def name_roles(paths: list[str], modules: Mapping[str, nn.Module] | None = None) -> dict[str, str]:
    """Map roles to paths by the rules of `find_backbones`, with students and backbones before teachers.

    Without ``modules``, as for names in a checkpoint, only the names decide.
    """
    roles: dict[str, str] = {}
    unnamed = []
    for path in paths:
        role = role_of(path)
        if role is None:
            unnamed.append(path)
        else:
            roles[role if role not in roles else path] = path
    students = [roles["student"]] if "student" in roles else unnamed
    pairs = [(s, t) for s in students for t in unnamed if s != t and _is_teacher_of(t, s, modules)]
    if "teacher" not in roles and len(pairs) == 1:
        for role, path in zip(("student", "teacher"), pairs[0], strict=True):
            roles[role] = path
            unnamed = [other for other in unnamed if other != path]
    if len(unnamed) == 1:
        other = "student" if "teacher" in roles else "teacher" if "student" in roles else "backbone"
        if other not in roles and (other != "teacher" or _may_teach(unnamed[0], roles["student"], modules)):
            roles[other] = unnamed.pop()
    roles.update({path: path for path in unnamed})
    order = {"student": 0, "backbone": 0, "teacher": 1}
    return dict(sorted(roles.items(), key=lambda item: order.get(item[0], 2)))


def _is_teacher_of(teacher: str, student: str, modules: Mapping[str, nn.Module] | None) -> bool:
    """Return whether the teacher has the student's name with the suffix ``_m``, or is a frozen copy."""
    if re.sub(r"_m(?=\.|$)", "", teacher) == student:
        return True
    return modules is not None and _is_frozen(modules[teacher]) and _is_copy(modules[teacher], modules[student])


def _may_teach(path: str, student: str, modules: Mapping[str, nn.Module] | None) -> bool:
    return modules is None or _is_frozen(modules[path]) or _is_copy(modules[path], modules[student])


def _is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())


def _is_copy(module: nn.Module, other: nn.Module) -> bool:
    """Return whether the parameters of two modules have the same names and shapes."""
    one, two = ({name: p.shape for name, p in m.named_parameters()} for m in (module, other))
    return one == two


def role_of(path: str) -> str | None:
    """Return the role that the first telling name in a path gives; an additional teacher keeps its own name.

    Only whole words count: ``semantic_encoder`` contains no "ema". MoCo's encoders end in ``_q`` and ``_k``.
    """
    for part in path.split("."):
        words = words_of(part)
        ending = words[-1] if len(words) > 1 else ""
        if not TEACHER.isdisjoint(words) or ending == "k":
            which = [word for word in words[:-1] if word not in PARTS] if ending == "teacher" else []
            return "_".join([*which, "teacher"])
        if not STUDENT.isdisjoint(words) or ending == "q":
            return "student"
    return None


def teacher_is_missed(module: nn.Module, roles: Iterable[str]) -> bool:
    """Return whether no role is a teacher although a name in the module suggests one (student, teacher, EMA)."""
    if any(role.endswith("teacher") for role in roles):
        return False
    names = [
        *vars(module),
        *(part for path, m in module.named_modules() if has_parameters(m) for part in path.split(".")),
    ]
    words = {word for name in names for word in words_of(name)}
    return "student" in roles or not {"teacher", "student"}.isdisjoint(words) or _averages(module)


def _averages(module: nn.Module) -> bool:
    paths = [path for path, m in module.named_modules() if has_parameters(m)]
    return any(not {"ema", "momentum"}.isdisjoint(words_of(path.rpartition(".")[2])) for path in paths)


def paths_of_both_roles(module: nn.Module, backbone: nn.Module) -> list[str]:
    """Return the paths that lead to a shared backbone, if only some of them name a teacher; else an empty list."""
    layers = [(name, m) for name, m in backbone.named_modules() if not m._modules and has_parameters(m)]
    held = []
    for name, layer in (*layers[:1], *layers[-1:]):
        paths = [path for path, m in module.named_modules(remove_duplicate=False) if m is layer]
        held.append([path.removesuffix(name).removesuffix(".") for path in paths if path.endswith(name)])
    both = [path for path in held[0] if path in held[-1]] if held else []
    return both if len(set(map(_is_teacher, both))) == 2 else []


def _is_teacher(path: str) -> bool:
    """Return whether a path names a teacher and no student: an EMA may wrap its model, as in ``ema.online_model``."""
    roles = [role_of(part) for part in path.split(".")]
    return "teacher" in roles and "student" not in roles


def has_parameters(module: nn.Module) -> bool:
    """Return whether a module, or one below it, has a parameter."""
    return next(module.parameters(), None) is not None
