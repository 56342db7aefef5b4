"""Recognise attention among the operations that PyTorch runs, and read single rows of it.

Two forms exist in ATen. *Fused* operations receive q, k and v; the requested rows are recomputed from q and k in
float32. *Explicit* attention is a softmax (or another function of scores) that becomes the left operand of the product
with V; the rows are sliced from that operand. RoPE, q/k norm, masks and autocast have been applied by then, so nothing
here depends on a model's library.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.attention_rows import (
    AttentionSource,
    ExplicitCall,
    FusedCall,
    Memory,
    Query,
    Weights,
    widen,
    widened_dtype,
)
from attn_monitor.capture.checked_rows import CheckedRows
from attn_monitor.capture.observation import Observation, ReadObservation, RefusedObservation
from attn_monitor.capture.tolerance import tolerance

aten = torch.ops.aten

SOFTMAX = {aten._softmax.default, aten._safe_softmax.default, aten._softmax.out, aten.softmax.int_out}
ELEMENTWISE = {aten.sigmoid.default, aten.relu.default, aten.exp.default}  # turn scores into weights without a softmax
PRODUCT = {aten.bmm.default, aten.bmm.out, aten.baddbmm.default}
_OWN = ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional")  # namespaces without foreign kernels


@functools.lru_cache(maxsize=256)
def _argument_names(func: Any) -> tuple[str, ...]:
    schema = getattr(func, "_schema", None)
    return tuple(a.name for a in schema.arguments) if schema is not None else ()


@functools.lru_cache(maxsize=1024)
def kind_of(func: Any) -> str:
    """Classify an operation by its possible part in attention; "" if it has none.

    "fused" operations are PyTorch's own attention, on (B, H, N, D). "softmax", "elementwise" and "product" are parts of
    explicit attention, "convolution" is part of a patch embedding. "foreign" operations are from outside PyTorch and
    may be attention kernels.
    """
    if getattr(func, "namespace", "") not in _OWN:
        return "foreign"
    if func in SOFTMAX:
        return "softmax"
    if func in ELEMENTWISE:
        return "elementwise"
    if func in PRODUCT:
        return "product"
    if func is aten.convolution.default:
        return "convolution"
    return "fused" if "_scaled_dot_product_" in str(func) else ""


def fused_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FusedCall:
    """Read the arguments of one of PyTorch's fused operations by their names in its schema."""
    named = {**dict(zip(_argument_names(func), args, strict=False)), **kwargs}
    bias = named.get("attn_mask", named.get("attn_bias"))
    return FusedCall(
        str(func),
        named["query"],
        named["key"],
        named["value"],
        bias,
        bool(named.get("is_causal")),
        named.get("scale"),
    )


def fused_result(out: Any) -> Tensor:
    """Return the result of a fused operation, which some return in a tuple with statistics."""
    result: Tensor = out if isinstance(out, Tensor) else out[0]
    return result


def observe_fused(call: FusedCall, result: Tensor | None, query: Query) -> Observation:
    """Read rows of a fused operation and compare them with its result unless that is None."""
    if call.q.ndim != 4:
        reason = f"its q has {call.q.ndim} dimensions, not (batch, heads, tokens, channels)"
        queries, keys = call.q.shape[-2], call.k.shape[-2]
        return RefusedObservation(op=call.op, batch=1, heads=1, queries=queries, keys=keys, reason=reason)
    batch, heads, queries, _ = call.q.shape
    shape: dict[str, Any] = {"op": call.op, "batch": batch, "heads": heads, "queries": queries, "keys": call.k.shape[2]}
    reason = _unreadable(query, queries, call.q, call.k, call.v)
    if reason:
        return RefusedObservation(**shape, reason=reason)
    return _read(call, call.v, None if result is None else call.output(result), query, shape)


def _unreadable(query: Query, queries: int, *tensors: Tensor) -> str:
    """Return why an operation cannot be read; "" if it can."""
    for tensor in tensors:
        if tensor.is_complex():
            return "its weights are complex numbers, of which no map can be drawn"
        if _foreign_type(tensor):
            return f"its tensors are {type(tensor).__name__}s (sharded over devices, or ragged), not plain tensors"
    if isinstance(query, int) and query >= queries:
        return f"it has {queries} queries, so no query {query}"
    return ""


def _foreign_type(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, torch.nn.Parameter)


def _read(
    source: AttentionSource, values: Tensor, output: Tensor | None, query: Query, shape: dict[str, Any]
) -> ReadObservation:
    """Read rows of an attention over values (B, H, K, D); compare each with the output (B, H, Q, D) unless None."""
    checked = CheckedRows(source, values, output)
    rows = checked.read(query)
    allowed = 0.0 if output is None else tolerance(output.dtype, output.device)
    return ReadObservation(
        **shape, rows=rows, values=values, output=output, source=source, error=checked.error, tolerance=allowed
    )


def is_same(a: Any, b: Tensor) -> bool:
    """Return whether two tensors of any shape are exactly the same memory."""
    return Memory(b).holds(a)


def attention_softmax(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Return whether a softmax could be attention: three or more dimensions, over the last one."""
    return isinstance(out, Tensor) and out.ndim >= 3 and args[1] in (-1, out.ndim - 1)


def read_weights(weights: Tensor, path: str, queries: Collection[Query], logits: Tensor | None) -> Weights:
    """Keep the rows of ``queries`` from weights (..., Q, K) that may meet a V; skip indices that do not exist."""
    last = {q: -1 if q == "mean" else max(q) if isinstance(q, tuple) else q for q in queries}
    known = [] if _foreign_type(weights) else [q for q in queries if last[q] < weights.shape[-2]]
    rows = {query: _row_of(weights, query) for query in known}
    return Weights(weights.shape, Memory(weights), path, rows, logits, weights.is_contiguous())


def explicit_call(weights: Sequence[Weights], args: tuple[Any, ...], images: int) -> ExplicitCall | None:
    """Interpret a batched product as attention if its left operand fits a softmax before it; None otherwise.

    The left operand may have heads that share one V folded into the queries, (L, H·Q, K), or lack columns of the
    softmax that meet no V, such as a sink, or hold some of its rows only.
    """
    for swapped, left, right in ((False, *args[:2]), (True, args[1].mT, args[0].mT)):  # einsum may put V first
        if fitting := [w for w in weights if w.shape[-2:] == left.shape[-2:] and _fits(w, left, images)]:
            return ExplicitCall(fitting, left, right, swapped)
        if folded := [w for w in weights if _are_folded(w, left)]:
            queries = folded[-1].shape[-2]
            heads = left.shape[-2] // queries
            shared = right[:, None].expand(-1, heads, -1, -1)
            return ExplicitCall(folded, left.unflatten(-2, (heads, queries)), shared, swapped, heads)
        if cut := [w for w in weights if _is_cut(w, left)]:
            return ExplicitCall(cut, left, right, swapped)
        if some := [w for w in weights if _are_some_rows(w, left)]:
            return ExplicitCall(some[-1:], left, right, swapped, part=_which_rows(some[-1], left))
    return None


def call_again(met: Sequence[tuple[Weights, str]], args: tuple[Any, ...], path: str) -> ExplicitCall | None:
    """Interpret a product as attention by weights that have met another V before; None otherwise.

    Either the module at ``path`` is another item of a list than the one where they met V (blocks that share a map), or
    the left operand holds some of their rows only.
    """
    for swapped, left, right in ((False, *args[:2]), (True, args[1].mT, args[0].mT)):
        for weights, other in reversed(met):
            if weights.memory.holds(left) and left.shape[-2:] == weights.shape[-2:] and _other_item(path, other):
                return ExplicitCall([weights], left, right, swapped)
            if _are_some_rows(weights, left):
                return ExplicitCall([weights], left, right, swapped, part=_which_rows(weights, left))
    return None


def _other_item(path: str, other: str) -> bool:
    """Return whether two modules are in different items of one list."""
    names = zip(path.split("."), other.split("."), strict=False)
    return next((a.isdigit() and b.isdigit() for a, b in names if a != b), False)


def _fits(weights: Weights, left: Tensor, images: int) -> bool:
    """Return whether the operand has as many heads as the softmax, or fewer because some were pruned."""
    heads, kept = (math.prod(t.shape[:-2]) for t in (weights, left))
    return heads == kept or (kept < heads and kept % images == 0)


def _are_folded(weights: Weights, left: Tensor) -> bool:
    queries, keys = weights.shape[-2:]
    return left.shape[-1] == keys and left.shape[-2] % queries == 0 and left.numel() == math.prod(weights.shape)


def _is_cut(weights: Weights, left: Tensor) -> bool:
    same_rows = math.prod(weights.shape[:-1]) == math.prod(left.shape[:-1]) and weights.shape[-2] == left.shape[-2]
    return same_rows and weights.shape[-1] > left.shape[-1] and weights.memory.overlaps(left)


def _are_some_rows(weights: Weights, left: Tensor) -> bool:
    same = weights.shape[-1] == left.shape[-1] and math.prod(weights.shape[:-2]) == math.prod(left.shape[:-2])
    fewer = weights.shape[-2] > left.shape[-2] and weights.contiguous
    return same and fewer and weights.memory.overlaps(left)


def _which_rows(weights: Weights, left: Tensor) -> slice:
    """Return which queries of a softmax the rows of the operand belong to."""
    queries, keys = weights.shape[-2:]
    first, count = weights.memory.offset(left) // keys % queries, left.shape[-2]
    step = left.stride(-2) // keys if count > 1 else 1
    return slice(first, first + (count - 1) * step + 1, step)


def observe_explicit(call: ExplicitCall, result: Tensor | None, images: int, query: Query) -> Observation:
    """Read rows of the operand that meets V, softmax or not; compare them with the product unless that is None."""
    last = call.weights[-1].shape
    lead = last[:-2] if math.prod(last[:-2]) == math.prod(call.applied.shape[:-2]) else call.applied.shape[:-2]
    queries, keys = call.applied.shape[-2:]
    batch, heads = _batch_and_heads(lead, images)
    shape: dict[str, Any] = {"op": "softmax -> bmm", "batch": batch, "heads": heads, "queries": queries, "keys": keys}
    reason = _unreadable(query, queries, call.applied, call.values)
    if reason:
        return RefusedObservation(**shape, reason=reason)
    source, values = (
        replace(call, shape=(batch, heads, queries, keys)),
        call.values.reshape(batch, heads, keys, -1),
    )
    output = None if result is None else call.result(result).reshape(batch, heads, queries, -1)
    return replace(_read(source, values, output, query, shape), mixed=_is_mixed(call, query))


def _is_mixed(call: ExplicitCall, query: Query) -> Tensor:
    """Return, on the device, whether the applied row equals no softmax before it up to rounding."""
    if call.part is not None:  # a view of the softmax itself
        return call.applied.new_zeros((), dtype=torch.bool)
    applied = _row_of(call.applied, query)  # (..., K)
    limit = 8 * torch.finfo(call.applied.dtype).eps
    keys = applied.shape[-1]
    known = [w.rows[query] for w in call.weights if query in w.rows]
    ends = [end for row in known if row.shape[-1] >= keys for end in (row[..., :keys], row[..., -keys:])]
    rows = [row.reshape(applied.shape) for row in ends if row.numel() == applied.numel()]
    if not rows:
        return applied.new_ones((), dtype=torch.bool)
    differences = [((applied - w.to(applied.dtype)).abs() / w.clamp_min(1 / keys)).max() for w in rows]
    return ~(torch.stack(differences).min() <= limit)


def _row_of(weights: Tensor, query: Query) -> Tensor:
    """Copy one query's row, or the mean over several, from (..., Q, K) to (..., K)."""
    if isinstance(query, int):
        return widen(weights[..., query, :].clone())
    several = weights if query == "mean" else weights[..., list(query), :]
    return several.mean(-2, dtype=widened_dtype(weights.dtype))


def _batch_and_heads(lead: Sequence[int], images: int) -> tuple[int, int]:
    """Return (B, H) for leading dimensions (B, H), (B·H,), or more if attention is windowed."""
    total = math.prod(lead)
    if len(lead) == 1:
        return (images, total // images) if total % images == 0 else (total, 1)
    return lead[0], total // lead[0]
