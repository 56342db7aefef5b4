"""Find modules that mix tokens like their siblings, but in operations that are not recognised as attention.

Layers are numbered in order of execution, so an overlooked layer would shift the numbers of later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from attn_monitor.capture.block_tokens import CONTAINERS
from attn_monitor.capture.error_origin import errors_from
from attn_monitor.capture.forward import Forward
from attn_monitor.capture.isolation import isolated_forward


def overlooked(
    model: nn.Module, images: Tensor, forward: Forward, seen: Iterable[str], entered: Iterable[str]
) -> dict[str, str]:
    """Find modules that mix tokens without observed attention and have a sibling with attention.

    A sibling is a module of the same class with a path that differs in one name: a list index or an attribute.

    Args:
        model: The model, left as it was found.
        images: (B, C, H, W), run once if there are modules to test.
        forward: How to call the model.
        seen: Paths of modules in which attention was observed.
        entered: Paths of modules that ran.

    Returns:
        The path of each such module, mapped to the path of its sibling.
    """
    modules, seen = dict(model.named_modules()), list(dict.fromkeys(seen))
    suspects: dict[str, str] = {}
    for path in entered:
        like = next((other for other in seen if _are_siblings(path, other, modules)), None)
        if like is not None and not any(_is_around(path, other) or _is_around(other, path) for other in seen):
            suspects[path] = like
    if not suspects:
        return {}
    mixing: set[str] = set()
    with isolated_forward(model), ExitStack() as stack:
        for path in suspects:
            hook = _ask(path, mixing)
            # Other hooks may free the module's parameters or change its results.
            stack.enter_context(modules[path].register_forward_hook(hook, with_kwargs=True, prepend=True))
        forward(model, images)
    return {path: like for path, like in suspects.items() if path in mixing}


def _are_siblings(path: str, other: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether the paths differ in one name and lead to modules of the same class."""
    a, b = path.split("."), other.split(".")
    if len(a) != len(b) or path not in modules or type(modules[path]) is not type(modules.get(other)):
        return False
    differing = sum(x != y for x, y in zip(a, b, strict=True))
    return differing == 1 and not isinstance(modules[path], (CONTAINERS, torch.jit.ScriptModule))


def _is_around(path: str, other: str) -> bool:
    return path in ("", other) or other.startswith(f"{path}.")


def _ask(path: str, mixing: set[str]) -> Callable[..., None]:
    """Return a forward hook that calls the module's forward again with single tokens changed."""

    @errors_from("monitor")
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if path not in mixing and _mixes_tokens(module, args, kwargs):
            mixing.add(path)

    return hook


def _mixes_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether changing one token of the arguments changes the result of another token."""
    given, spec = tree_flatten((args, kwargs))

    def results(values: list[Any]) -> list[Tensor]:
        # The module may write to its arguments.
        again, named = tree_unflatten([v.clone() if isinstance(v, Tensor) else v for v in values], spec)
        out = tree_flatten(module.forward(*again, **named))[0]
        return [t for t in out if isinstance(t, Tensor) and t.is_floating_point()]

    plain, repeated = results(given), results(given)
    if [t.shape for t in plain] != [t.shape for t in repeated]:
        return False
    chance = [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(plain, repeated, strict=True)]
    for number, dim, token in _tokens_of(given):
        changed = list(given)
        changed[number] = _with_other_token(given[number], dim, token)
        for before, after, by_chance in zip(plain, results(changed), chance, strict=True):
            if before.shape != after.shape or before.ndim <= dim:
                continue
            same_tokens = before.shape[dim] == given[number].shape[dim]
            if not same_tokens and token == 0:  # the result may be a selection of tokens, such as CLS
                continue
            difference = (after - before).abs()
            if same_tokens:
                difference.select(dim, token).zero_()
            if float(difference.max()) > 10 * by_chance:
                return True
    return False


def _tokens_of(given: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield (tensor's number, dimension, index) of the first and last token of each tensor that may hold tokens.

    Treating the batch as tokens is harmless, because images do not mix. In four dimensions, rows count as tokens.
    """
    for number, value in enumerate(given):
        if not isinstance(value, Tensor) or not value.is_floating_point() or not 2 <= value.ndim <= 4:
            continue
        for dim in (2,) if value.ndim == 4 else range(value.ndim - 1):
            if value.shape[dim] > 1:
                yield number, dim, 0
                yield number, dim, value.shape[dim] - 1


def _with_other_token(x: Tensor, dim: int, token: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    other = torch.randn(x.select(dim, token).shape, generator=generator).to(x)
    changed = x.clone()
    changed.select(dim, token).copy_(3 * other * x.std() + x.mean())
    return changed
