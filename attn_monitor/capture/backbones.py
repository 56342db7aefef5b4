"""Find the vision transformers in a module tree and name their roles: student, teacher, or a single backbone."""

from __future__ import annotations

import difflib
import re
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from attn_monitor.capture.block_tokens import CONTAINERS, block_of
from attn_monitor.capture.observe.isolation import is_sharded
from attn_monitor.capture.observe.module_paths import is_inside, words_of
from attn_monitor.capture.site_cache import structure_of
from attn_monitor.capture.site_discovery import attends_to_images
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
"""Words beside "teacher" that name the kind of module, not one of several teachers."""


def find_backbones(module: nn.Module, images: Tensor | None = None) -> dict[str, str]:
    """Find the backbones of a module and map each role to a dotted path.

    A backbone is the smallest module that holds a patch embedding and attention. If none is found by name, it is the
    smallest module that attends to tokens of ``images`` when run. Its role follows from the words in its path (teacher,
    momentum, ema, target, key; student, online, anchor, query). Without such words, a backbone is the teacher if it is
    a frozen copy of a trained one, or has its name with the suffix ``_m``. A single unnamed backbone beside a teacher
    is the student; beside a student it is the teacher if it is frozen or a copy; alone it is called "backbone". A
    module with two names counts once, by its first name; a teacher may share its patch embedding with the student.

    Args:
        module: The module to search, such as a LightningModule.
        images: (B, C, H, W), to run modules on if no name identifies a backbone; None to search by name only.

    Returns:
        Role to path, such as ``{"student": "student.backbone", "teacher": "teacher.backbone"}``.

    Raises:
        NoAttentionError: No backbone was found; the message lists the modules that were searched.

    Example:
        >>> import copy
        >>> from timm.models import VisionTransformer
        >>> model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> find_backbones(nn.ModuleDict({"student": model, "teacher": copy.deepcopy(model)}))
        {'student': 'student', 'teacher': 'teacher'}
    """
    named = list(module.named_modules())
    attention = [path for path, m in named if _is_attention(path, m)]
    holders = _holders(module, attention)
    paths = [p for p, _ in named if p in holders and not any(q != p and is_inside(q, p) for q in holders)]
    if not paths and images is not None:
        paths = _found_by_running(module, images)
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
    return name_roles(paths, dict(named))


def modules_to_run(module: nn.Module) -> list[str]:
    """Return the paths of modules that may be backbones by structure instead of name, innermost first.

    These modules contain attention or lists of equal blocks; a convolutional network has none.
    """
    known = dict(module.named_modules())
    attention = [path for path, m in known.items() if _is_attention(path, m)]
    if not attention and any(map(_convolves, known.values())):
        return []
    for path, m in known.items():
        if isinstance(m, CONTAINERS) and len(m._modules) > 1 and len({*map(type, m.children())}) == 1:
            attention += [f"{path}.{name}".strip(".") for name in m._modules]
    found = dict[str, None]()
    for path in attention:
        above = block_of(path, attention, known) or path
        while above:
            above = above.rpartition(".")[0]
            if not isinstance(known[above], (nn.ModuleList, nn.ModuleDict)):
                found[above] = None
    return sorted(found, key=lambda path: -len(path.split(".")) if path else 0)


_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, torch.Size], list[str]]] = weakref.WeakKeyDictionary()
"""Cached results of `_found_by_running`, valid while the module's structure and the image size stay the same."""


def _found_by_running(module: nn.Module, images: Tensor) -> list[str]:
    known, conditions = dict(module.named_modules()), (structure_of(module), images.shape[1:])
    if is_sharded(module):  # submodules under FSDP cannot run alone
        return []
    if _FOUND.get(module, (None, []))[0] != conditions:
        found = list[str]()
        for path in modules_to_run(module):
            if not any(is_inside(other, path) for other in found) and attends_to_images(known[path], images):
                found.append(path)
        _FOUND[module] = conditions, [path for path in known if path in found]
    return _FOUND[module][1]


def teacher_is_missed(module: nn.Module, roles: Iterable[str]) -> bool:
    """Return whether no role is a teacher although a name in the module suggests one (student, teacher, EMA)."""
    if any(role.endswith("teacher") for role in roles):
        return False
    names = [
        *vars(module),
        *(part for path, m in module.named_modules() if _has_parameters(m) for part in path.split(".")),
    ]
    words = {word for name in names for word in words_of(name)}
    return "student" in roles or not {"teacher", "student"}.isdisjoint(words) or _averages(module)


def _averages(module: nn.Module) -> bool:
    paths = [path for path, m in module.named_modules() if _has_parameters(m)]
    return any(not {"ema", "momentum"}.isdisjoint(words_of(path.rpartition(".")[2])) for path in paths)


def paths_of_both_roles(module: nn.Module, backbone: nn.Module) -> list[str]:
    """Return the paths that lead to a shared backbone, if only some of them name a teacher; else an empty list."""
    layers = [(name, m) for name, m in backbone.named_modules() if not m._modules and _has_parameters(m)]
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


def _holders(module: nn.Module, attention: list[str]) -> set[str]:
    """Return the paths of modules that hold a patch embedding, perhaps shared with another module of their class.

    A module of another class that merely refers to the embedding is excluded.
    """
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
    """Return the closest ancestor of a patch embedding that also contains attention."""
    path = patch_embedding
    while path:
        path = path.rpartition(".")[0]
        if any(is_inside(a, path) for a in attention):
            return path
    return None


def _embeds_patches(name: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        kernel, stride = tuple(module.kernel_size), tuple(module.stride)
        return kernel == stride and max(kernel) > 1
    return bool(re.search(r"patch|^embeds$", name.rpartition(".")[2].lower())) and _has_parameters(module)


def _convolves(module: nn.Module) -> bool:
    """Return whether a module is a convolution with overlapping windows, unlike a patch embedding."""
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and module.kernel_size != module.stride


def _is_attention(name: str, module: nn.Module) -> bool:
    words = f"{type(module).__name__} {name.rpartition('.')[2]}".lower()
    return bool(re.search(r"att(entio)?n|qkv", words)) and _has_parameters(module)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


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


def check_paths(module: nn.Module, targets: Mapping[str, str] | None) -> None:
    """Raise if a target does not exist, or if no targets are given and no backbone is possible; nothing is run."""
    if targets is not None:
        resolve_targets(module, targets)
    elif not modules_to_run(module):
        find_backbones(module)


def resolve_targets(module: nn.Module, targets: Mapping[str, str]) -> dict[str, nn.Module]:
    """Map each role to its module by the paths in ``targets``; raise `TargetError` for an unknown path."""
    known = dict(module.named_modules())
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
