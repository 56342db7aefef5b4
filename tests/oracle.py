"""Attention matrices of a model in float64, by means that have nothing to do with PyTorch's dispatcher.

Python names are replaced while the model runs: `scaled_dot_product_attention` by a plain computation, `softmax` by one
that keeps its result. Only what a Python call gives is seen here; only what the dispatcher is asked for is seen there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    def sdpa(*args: Any, **kwargs: Any) -> Tensor:
        out, matrix = plain_attention(*args, **kwargs)
        matrices.append(matrix)
        return out

    def softmax(x: Tensor, dim: int = -1, *_: Any, **__: Any) -> Tensor:  # a dtype asked for is not obeyed: float64
        out = _softmax(x, dim)
        if x.ndim >= 3 and dim in (-1, x.ndim - 1):
            matrices.append(out)
        return out

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            mock.patch("torch.nn.functional.scaled_dot_product_attention", sdpa),
            mock.patch("torch.nn.functional.softmax", softmax),
            mock.patch("torch.softmax", softmax),
            mock.patch.object(torch.Tensor, "softmax", softmax),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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
