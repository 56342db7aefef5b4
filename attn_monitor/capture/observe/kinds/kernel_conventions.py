"""Interpret the arguments and results of an attention kernel in every way that fits: as q, k, v and a result."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from attn_monitor.capture.observe.kinds.fused import CallingConvention, FusedCall
from attn_monitor.capture.observe.kinds.kernel_arguments import KernelOptions, possible_qkv
from attn_monitor.capture.observe.kinds.kind import Operation


def results_of(operation: Operation, out: Any) -> list[Tensor]:
    """Return the tensors that an operation returned, and then those that it wrote to."""
    written = [operation.named.get(name) for name in operation.written]
    return [t for t in (*tree_leaves(out), *written) if isinstance(t, Tensor)]


def possible_calls(operation: Operation, options: KernelOptions, results: Sequence[Tensor]) -> Iterator[FusedCall]:
    """Yield every convention that fits the arguments: layouts times scales times masks; none if it is no attention."""
    numbers = [a for a in operation.named.values() if isinstance(a, float) and a > 0]
    layouts = (False, True) if options.lengths is None else (True,)
    for (dim, qkv), tokens_first in itertools.product(possible_qkv(operation, options), layouts):
        q, k, v = (t.transpose(1, 2) for t in qkv) if tokens_first else qkv
        if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:  # heads of queries share heads of keys
            continue
        # Numbers first: another may be given in the next call.
        scales = enumerate([*numbers, 1 / math.sqrt(q.shape[-1]), 1.0] if options.scale is None else [options.scale])
        either = (False, True) if q.shape[2] == k.shape[2] else (False,)
        causal = either if options.causal is None else (options.causal,)
        if not _fit(options, q.shape[1], q.shape[2], k.shape[2]):
            continue
        views = [
            (number, heads_first, view)
            for number, result in enumerate(results)
            for heads_first, view in _views(result, q.shape[:-1], v.shape[-1])
        ]
        for (number, heads_first, view), (place, scale), is_causal in itertools.product(views, scales, causal):
            yield FusedCall(
                operation.name,
                q,
                k,
                v,
                view,
                replace(options, scale=scale, causal=is_causal),
                CallingConvention(dim, tokens_first, place, is_causal, heads_first, number),
            )


def _fit(options: KernelOptions, heads: int, queries: int, keys: int) -> bool:
    """Return whether what a kernel is given beside q, k and v is of so many heads, queries and keys."""
    bias, alibi, sinks = options.bias, options.alibi, options.sinks
    shape = () if bias is None else bias.shape[-3:]
    as_bias = all(n in (1, m) for n, m in zip(reversed(shape), (keys, queries, heads), strict=False))
    return as_bias and (alibi is None or alibi.shape[-1] == heads) and (sinks is None or sinks.numel() == heads)


def _views(result: Tensor, lead: Sequence[int], width: int) -> Iterator[tuple[bool, Tensor]]:
    """Yield (whether heads come first, the result as (B, H, Q, D) in its own memory) for each layout that fits."""
    batch, heads, queries = lead
    for heads_first, shape in ((True, (batch, heads, queries, width)), (False, (batch, queries, heads, width))):
        if result.numel() == math.prod(shape) and (result.shape == shape or result.is_contiguous()):
            view = result.view(shape)
            yield heads_first, view if heads_first else view.transpose(1, 2)
