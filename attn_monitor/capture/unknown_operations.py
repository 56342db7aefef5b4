"""Find the calling convention of third-party attention kernels, and read their rows.

Only the arguments of such an operation are known. Each way in which its tensors could be q, k and v is a candidate; the
one that best explains the kernel's result is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.attention_rows import CallingConvention, FusedCall, Query
from attn_monitor.capture.observation import Observation, ReadObservation
from attn_monitor.capture.operations import observe_fused


def looks_like_attention(args: tuple[Any, ...]) -> bool:
    """Return whether the first arguments look like q, k, v or packed qkv."""
    return _separate_qkv(args) is not None or _packed_qkv(args) is not None


def first_tensor(out: Any) -> Tensor | None:
    """Return the tensor itself, or the first one of a tuple; None if there is none."""
    return out if isinstance(out, Tensor) else next((o for o in out or () if isinstance(o, Tensor)), None)


def candidate_calls(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> list[FusedCall]:
    """Return the attention calls that fit the size of an operation's result; empty if it is not attention."""
    return [
        call
        for call in _possible_calls(func, args, kwargs)
        if result.numel() == call.q.numel() // call.q.shape[-1] * call.v.shape[-1]
    ]


def call_by(convention: CallingConvention | None, calls: Sequence[FusedCall]) -> FusedCall:
    """Return the candidate with this convention, else the first one."""
    return next((call for call in calls if call.convention == convention), calls[0])


def observe_unknown(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calls: Sequence[FusedCall],
    result: Tensor,
    query: Query,
    convention: CallingConvention | None,
) -> Observation:
    """Read rows of a third-party operation.

    Args:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        calls: The candidates, see `candidate_calls`.
        result: The tensor that it computed.
        query: The query to read.
        convention: Its convention if known; None to find the one that best explains its result on random q, k and v.
    """
    convention = convention or _convention_of_kernel(func, args, kwargs) or _best_convention(calls, result)
    call = call_by(convention, calls)
    seen = observe_fused(call, result, query)
    return replace(seen, convention=call.convention) if isinstance(seen, ReadObservation) else seen


def _separate_qkv(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
    tensors = [a for a in args if isinstance(a, Tensor)][:3]
    if len(tensors) < 3 or any(t.ndim != 4 or not t.is_floating_point() for t in tensors):
        return None
    q, k, v = tensors
    return (q, k, v) if k.shape == v.shape and q.shape[-1] == k.shape[-1] and q.shape[0] == k.shape[0] else None


def _packed_qkv(args: tuple[Any, ...]) -> Tensor | None:
    first = next((a for a in args if isinstance(a, Tensor)), None)
    return first if first is not None and first.ndim == 5 and 3 in first.shape[:4] else None


def _possible_calls(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[FusedCall]:
    """Yield every convention that fits the arguments: layouts times scales times masks."""
    separate, packed = _separate_qkv(args), _packed_qkv(args)
    if separate is not None:
        triples = {-1: separate}
    elif packed is not None:
        splits = ((dim, packed.unbind(dim)) for dim in range(4) if packed.shape[dim] == 3)
        triples = {dim: (q, k, v) for dim, (q, k, v) in splits}
    else:
        return
    # A scale may be among the float arguments.
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, float) and a > 0]
    for (dim, triple), tokens_first in itertools.product(triples.items(), (False, True)):
        q, k, v = (t.transpose(1, 2) for t in triple) if tokens_first else triple
        scales = dict.fromkeys([1 / math.sqrt(q.shape[-1]), 1.0, *given])
        causal = (False, True) if q.shape[2] == k.shape[2] else (False,)
        for scale, is_causal, heads_first in itertools.product(scales, causal, (True, False)):
            convention = CallingConvention(dim, tokens_first, scale, is_causal, heads_first)
            yield FusedCall(str(func), q, k, v, None, is_causal, scale, heads_first, convention)


def _convention_of_kernel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallingConvention | None:
    """Find the convention on random q, k and v: their sharp attention fits one, near-uniform attention fits many."""
    count = 1 if _separate_qkv(args) is None else 3
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)][:count]
    sharp = list(args)
    for i in places:
        noise = torch.randn(args[i].shape, generator=torch.Generator().manual_seed(i))
        sharp[i] = torch.empty_like(args[i]).copy_(2 * noise)
    try:
        result = first_tensor(func(*sharp, **kwargs))
    except Exception:  # the kernel may reject random tensors; then the model's own are used
        return None
    return None if result is None else _best_convention(candidate_calls(func, tuple(sharp), kwargs, result), result)


def _best_convention(calls: Sequence[FusedCall], result: Tensor) -> CallingConvention | None:
    def error(call: FusedCall) -> float:
        # Weight the first query like all together: it may be the only one that an unknown mask leaves alone.
        seen = (observe_fused(call, result, query) for query in ("mean", 0))
        errors = [float(s.error) for s in seen if isinstance(s, ReadObservation) and s.error is not None]
        return sum(errors) if errors else math.inf

    return min(calls, key=error).convention if calls else None
