"""Find modules that mix tokens like their siblings, but in operations that are not recognised as attention.

Layers are numbered in order of execution, so an overlooked layer would shift the numbers of later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from attn_monitor.capture.block_tokens import CONTAINERS
from attn_monitor.capture.observe.error_origin import errors_from
from attn_monitor.capture.observe.forward import Forward, in_one_line
from attn_monitor.capture.observe.isolation import isolated_forward
from attn_monitor.capture.observe.module_paths import is_inside

_EQUAL = 1e-2  # relative difference of results that rounding explains


def overlooked(
    model: nn.Module,
    images: Tensor,
    forward: Forward,
    seen: Iterable[str],
    entered: Iterable[str],
    kernels: Collection[str],
) -> dict[str, tuple[str, str]]:
    """Find modules that mix tokens without observed attention and have a sibling with attention.

    A sibling is a module of the same class with a path that differs in one name: a list index or an attribute. Where a
    module runs an unseen kernel, it is enough that a module around it is a sibling of one around attention, or that no
    attention was observed at all.

    Args:
        model: The model, left as it was found.
        images: (B, C, H, W), run once if there are modules to test.
        forward: How to call the model.
        seen: Paths of modules in which attention was observed.
        entered: Paths of modules that ran.
        kernels: Paths of modules in which a kernel ran that the dispatcher does not see.

    Returns:
        The path of each such module, mapped to the path of its sibling, or "" if it has none, and to the error with
        which it answered other tokens, so that whether it mixes them is not known; "" if it does.
    """
    modules, seen = dict(model.named_modules()), list(dict.fromkeys(seen))
    suspects: dict[str, str] = {}
    for path in entered:
        related = _are_related if path in kernels else _are_siblings
        like = next((other for other in seen if related(path, other, modules)), None)
        if not seen and path in kernels:
            like = ""
        if like is not None and not any(p == path or is_inside(p, path) or is_inside(path, p) for p in seen):
            suspects[path] = like
    if not suspects:
        return {}
    mixing: dict[str, str] = {}
    with isolated_forward(model), ExitStack() as stack:
        for path in suspects:
            hook = _mixing_hook(path, mixing, path in kernels)
            # Other hooks may free the module's parameters or change its results.
            stack.enter_context(modules[path].register_forward_hook(hook, with_kwargs=True, prepend=True))
        forward(model, images)
    return {path: (like, mixing[path]) for path, like in suspects.items() if path in mixing}


def _are_siblings(path: str, other: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether the paths differ in one name and lead to modules of the same class."""
    a, b = path.split("."), other.split(".")
    if len(a) != len(b) or path not in modules or type(modules[path]) is not type(modules.get(other)):
        return False
    differing = sum(x != y for x, y in zip(a, b, strict=True))
    return differing == 1 and not isinstance(modules[path], (CONTAINERS, torch.jit.ScriptModule))


def _are_related(path: str, other: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether two modules are siblings, or are in modules that are."""
    a, b = path.split("."), other.split(".")
    return any(_are_siblings(".".join(a[:n]), ".".join(b[:n]), modules) for n in range(1, min(len(a), len(b)) + 1))


def _mixing_hook(path: str, mixing: dict[str, str], kernel: bool) -> Callable[..., None]:
    """Return a forward hook that calls the module's forward again with single tokens changed, see `_mixes_tokens`."""

    @errors_from("monitor")
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if path in mixing:
            return
        try:
            mixes, problem = _mixes_tokens(module, args, kwargs, kernel), ""
        except Exception as error:  # the module may reject such tokens
            mixes, problem = True, in_one_line(error)
        if mixes:
            mixing[path] = problem

    return hook


def _mixes_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kernel: bool) -> bool:
    """Return whether changing one token of the arguments changes the result of another token.

    Args:
        module: The module to call.
        args: Its arguments.
        kwargs: Its arguments by name.
        kernel: Whether it runs an unseen kernel. Then tokens may be along dimension 1 of four, as in (B, N, H, D), and
            equal tokens must have equal results, as in a weighted mean; scans and convolutions mix tokens too.
    """
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
    for number, dim, token in _tokens_of(given, 1 if kernel else 2):
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
            if float(difference.max()) > 10 * by_chance and not (kernel and _parts_equal(given, number, dim, results)):
                return True
    return False


def _parts_equal(given: list[Any], number: int, dim: int, results: Callable[[list[Any]], list[Tensor]]) -> bool:
    """Return whether tokens that are all equal in the arguments differ in the results."""
    count = given[number].shape[dim]

    def over_tokens(x: Any) -> bool:
        tokens = isinstance(x, Tensor) and x.is_floating_point() and x.ndim == given[number].ndim
        return tokens and x.shape[dim] == count

    equal = [x.narrow(dim, 0, 1).expand_as(x) if over_tokens(x) else x for x in given]
    outs = [out for out in results(equal) if out.ndim > dim and out.shape[dim] == count]
    spread = [float((out - out.narrow(dim, 0, 1)).abs().max()) > _EQUAL * float(out.abs().max()) for out in outs]
    return any(spread)


def _tokens_of(given: list[Any], axis: int) -> Iterator[tuple[int, int, int]]:
    """Yield (tensor's number, dimension, index) of the first and last token of each tensor that may hold tokens.

    Treating the batch as tokens is harmless, because images do not mix.
    """
    for number, value in enumerate(given):
        if not isinstance(value, Tensor) or not value.is_floating_point() or not 2 <= value.ndim <= 4:
            continue
        for dim in range(axis, 3) if value.ndim == 4 else range(value.ndim - 1):
            if value.shape[dim] > 1:
                yield number, dim, 0
                yield number, dim, value.shape[dim] - 1


def _with_other_token(x: Tensor, dim: int, token: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    other = torch.randn(x.select(dim, token).shape, generator=generator, device="cpu").to(x)
    changed = x.clone()
    changed.select(dim, token).copy_(3 * other * x.std() + x.mean())
    return changed
