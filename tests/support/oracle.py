"""Attention matrices of a model in float64, by means that have nothing to do with PyTorch's dispatcher.

Python names are replaced while the model runs: `scaled_dot_product_attention` by a plain computation, `softmax` by one
that keeps its result, products by ones that keep what a softmax was made into before it met V. Only what a Python call
gives is seen here; only what the dispatcher is asked for is seen there.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

_softmax = torch.softmax


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output, matrix) by the definition in PyTorch's documentation."""
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores + torch.full_like(scores, -math.inf).triu(1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    matrix = _softmax(scores, -1)
    return matrix @ value, matrix


@contextmanager
def _recording(matrices: list[Tensor]) -> Iterator[None]:
    waiting: list[Tensor] = []  # a softmax that has not met its V; what does so takes its place

    def product(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        left, right = [*(a for a in args if isinstance(a, Tensor)), None, None][:2]
        meets_values = right is not None and right.ndim >= 3 and left.shape[-1] == right.shape[-2]  # else it is mixed
        if waiting and meets_values and left.shape[-2:] == waiting[0].shape[-2:]:
            matrices[-1] = left
            waiting.clear()
        return original(*args, **kwargs)

    def sdpa(*args: Any, **kwargs: Any) -> Tensor:
        out, matrix = plain_attention(*args, **kwargs)
        matrices.append(matrix)
        return out

    def softmax(x: Tensor, dim: int = -1, *_: Any, **__: Any) -> Tensor:  # a dtype asked for is not obeyed: float64
        out = _softmax(x, dim)
        if x.ndim >= 3 and dim in (-1, x.ndim - 1):
            matrices.append(out)
            waiting[:] = [out]
        return out

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    loaded = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
    by_name = [m for m in loaded if vars(m).get("einsum") is torch.einsum and m is not torch]
    try:
        with ExitStack() as stack:
            for module in by_name:  # `from torch import einsum`
                stack.enter_context(mock.patch.object(module, "einsum", partial(product, torch.einsum)))
            stack.enter_context(_replaced(sdpa, softmax, product))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _replaced(sdpa: Any, softmax: Any, product: Any) -> Iterator[None]:
    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", sdpa),
        mock.patch("torch.nn.functional.softmax", softmax),
        mock.patch("torch.softmax", softmax),
        mock.patch.object(torch.Tensor, "softmax", softmax),
        mock.patch("torch.einsum", partial(product, torch.einsum)),
        mock.patch("torch.matmul", partial(product, torch.matmul)),
        mock.patch.object(torch.Tensor, "__matmul__", _method(product, torch.Tensor.__matmul__)),
    ):
        yield


def _method(product: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: product(original, self, other)


def attention_matrices(
    model: nn.Module,
    images: Tensor,
    forward: Callable[[nn.Module, Tensor], Any],
    method: tuple[str, str] | None = None,
) -> list[Tensor]:
    """(B, H, Q, K) of every attention in order of execution, float64.

    ``method``: class and method names of the library's own way to a matrix, for attention that is no plain softmax.
    """
    model = copy.deepcopy(model).double().eval()
    matrices: list[Tensor] = []
    patches = []
    if method is not None:
        owner = next(type(m) for m in model.modules() if type(m).__name__ == method[0])
        original = getattr(owner, method[1])

        def recorded(*args: Any) -> Any:
            before = len(matrices)
            matrix = original(*args)
            matrices[before:] = [matrix]  # in place of the softmaxes that it is made of
            return matrix

        patches.append(mock.patch.object(owner, method[1], recorded))
    with torch.no_grad(), _recording(matrices):
        for patch in patches:
            patch.start()
        try:
            forward(model, images.double())
        finally:
            for patch in patches:
                patch.stop()
    return [m.reshape(len(images), -1, *m.shape[-2:]) for m in matrices]


def masked_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What enters the softmax of `plain_attention`: (B, H, Q, K), -inf where masked."""
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(groups, 1))
    scores = scores * (scale if scale is not None else query.shape[-1] ** -0.5)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.masked_fill(~visible, -math.inf)


def logit_matrices(model: nn.Module, images: Tensor, forward: Callable[[nn.Module, Tensor], Any]) -> list[Tensor]:
    """(B, H, Q, K) of what enters the softmax of every attention in order of execution, float64."""
    model, kept = copy.deepcopy(model).double().eval(), list[Tensor]()

    def sdpa(*args: Any, **kwargs: Any) -> Tensor:
        scores = masked_scores(*args, **kwargs)
        kept.append(scores)
        value = args[2]
        return _softmax(scores, -1) @ value.repeat_interleave(scores.shape[1] // value.shape[1], 1)

    def softmax(x: Tensor, dim: int = -1, *_: Any, **__: Any) -> Tensor:
        if x.ndim >= 3:
            kept.append(x.detach().clone())
        return _softmax(x, dim)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _replaced(sdpa, softmax, lambda original, *args, **kwargs: original(*args, **kwargs)):
            forward(model, images.double())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return [m.reshape(len(images), -1, *m.shape[-2:]) for m in kept]
