"""Find the vision transformers in a module tree and name their roles: student, teacher, or a single backbone."""

from __future__ import annotations

import difflib
import re
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attn_monitor.capture.block_tokens import CONTAINERS, block_of
from attn_monitor.capture.observe.isolation import is_sharded
from attn_monitor.capture.observe.module_paths import is_inside
from attn_monitor.capture.role_names import has_parameters, name_roles
from attn_monitor.capture.site_cache import structure_of
from attn_monitor.capture.site_discovery import attends_to_images
from attn_monitor.errors import NoAttentionError, TargetError


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
    return bool(re.search(r"patch|^embeds$", name.rpartition(".")[2].lower())) and has_parameters(module)


def _convolves(module: nn.Module) -> bool:
    """Return whether a module is a convolution with overlapping windows, unlike a patch embedding."""
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and module.kernel_size != module.stride


def _is_attention(name: str, module: nn.Module) -> bool:
    words = f"{type(module).__name__} {name.rpartition('.')[2]}".lower()
    return bool(re.search(r"att(entio)?n|qkv", words)) and has_parameters(module)


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
