"""Measure the tokens that enter a transformer block: norms, similarity of CLS and patches, patch features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.attention_rows import widen
from attn_monitor.capture.observe.error_origin import errors_from
from attn_monitor.capture.observe.module_paths import children_with
from attn_monitor.functional import full_precision

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class TokenStatistics:
    """Hold statistics of the tokens that enter one layer.

    Attributes:
        norms: (B, T), prefix first and patches row by row.
        cosine: (B,), the mean cosine similarity of the CLS token and the patches; None without a CLS token.
        patches: (B, N, C) float16, the patch tokens at unit length; None unless requested.
    """

    norms: Tensor
    cosine: Tensor | None
    patches: Tensor | None


def block_of(path: str, others: Iterable[str], modules: dict[str, nn.Module]) -> str | None:
    """Return the path of the transformer block around an attention module; None if no list of modules contains it.

    A block is an item of a list in which several items hold attention; with only one layer, an item of any list.

    Args:
        path: The attention module.
        others: The paths of all attention modules.
        modules: Every module of the model by path.
    """
    parts, others = path.split("."), list(others)
    fallback = None
    for depth in range(len(parts), 0, -1):
        parent, item = ".".join(parts[: depth - 1]), ".".join(parts[:depth])
        if not isinstance(modules.get(parent), CONTAINERS):
            continue
        found = _callable_below(item, path, modules)
        fallback = fallback or found
        if len(children_with(others, parent)) > 1:
            return found
    return fallback


def _callable_below(item: str, path: str, modules: dict[str, nn.Module]) -> str | None:
    """Return the item, or if it is a list, the first module with a forward on the way to ``path``."""
    below = path[len(item) :].strip(".").split(".") if path != item else []
    while isinstance(modules[item], (nn.ModuleList, nn.ModuleDict)):
        if not below:
            return None
        item = f"{item}.{below.pop(0)}"
    return item


def watch_tokens(
    stack: ExitStack, block: nn.Module, batch: int, order: Tensor, num_prefix: int, has_cls: bool, patches: bool,
    report: Callable[[TokenStatistics], object],
) -> None:  # fmt: skip
    """Report statistics of the tokens that enter a block, if an argument is (B, T, C) or (T, B, C).

    Args:
        stack: Removes the hook when it is closed.
        block: The transformer block.
        batch: Number of images B.
        order: (T,) token indices, CLS first, then the rest of the prefix, then the patches row by row.
        num_prefix: Number of prefix tokens.
        has_cls: Whether the first token in ``order`` is the CLS token.
        patches: Whether to keep the patch tokens.
        report: Called once for each run of the block.
    """
    shape = (batch, len(order))

    @errors_from("monitor")
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x in (*args, *kwargs.values()):
            if not isinstance(x, Tensor) or x.is_nested or x.ndim != 3 or x.shape[:2] not in (shape, shape[::-1]):
                continue
            batch_first = x.shape[:2] == shape
            report(_statistics(x if batch_first else x.transpose(0, 1), order, num_prefix, has_cls, patches))
            return

    stack.enter_context(block.register_forward_pre_hook(hook, with_kwargs=True))


@full_precision()  # a hook runs under the model's autocast
def _statistics(x: Tensor, order: Tensor, num_prefix: int, has_cls: bool, patches: bool) -> TokenStatistics:
    norms: Tensor = torch.linalg.vector_norm(widen(x), dim=-1)
    places = order[num_prefix:]
    unit = (widen(x[:, places]) / norms[:, places, None].clamp_min(1e-8)).half() if patches else None
    if not has_cls:
        return TokenStatistics(norms[:, order], None, unit)
    cls = order[:1]
    products = (widen(x) @ widen(x[:, cls]).mT)[..., 0]  # (B, T)
    cosines = products / (norms * norms[:, cls]).clamp_min(1e-8)
    return TokenStatistics(norms[:, order], cosines[:, places].mean(-1), unit)
