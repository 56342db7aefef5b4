"""Recognise attention among the operations that PyTorch runs, and read single rows of it.

Two forms exist once a model has been dispatched to ATen. *Fused* operations receive q, k and v; the rows asked
for are recomputed from q and k in float32. *Explicit* attention is a softmax whose result later becomes the left
operand of the product with V; the rows are sliced from it. Whatever came before (RoPE, q/k norm, masks, autocast)
has been applied by then, so nothing here depends on the library that a model comes from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Query = int | str
"""A token index, or "mean": the average over all queries."""

SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
PRODUCT = {aten.bmm.default}

# Relative to what the output's own precision allows: sums of |row|·|V|, see `relative_error`.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

_MEAN_CHUNK = 64  # queries per softmax when all queries are averaged: memory stays O(tokens)


@dataclass
class Observation:
    """One attention operation as it ran: its shape, and the rows that were asked for.

    ``rows`` is (B, H, K) float32 and ``values`` (B, H, K, D); both None when ``problem`` says why not.
    ``error`` is the largest relative difference between what the rows imply and what the model computed.
    ``mixed`` marks attention that is not applied as the softmax gave it (talking heads, gated mixes).
    """

    op: str
    batch: int
    heads: int
    queries: int
    keys: int
    rows: Tensor | None = None
    values: Tensor | None = None
    error: float | None = None
    tolerance: float = 0.0
    mixed: bool = False
    problem: str | None = None


@dataclass
class FusedCall:
    """The arguments of one fused attention call, as (B, H, N, D) tensors."""

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    heads_first: bool = True  # False: the operation's own layout, and so its output's, is (B, N, H, D)

    def rows(self, query: Query) -> Tensor:
        """Attention of one query token, or the mean over all: (B, H, K) float32 (float64 for float64 input)."""
        if query != "mean":
            return self._softmax(slice(int(query), int(query) + 1))[:, :, 0]
        total = torch.zeros(())
        for start in range(0, self.q.shape[2], _MEAN_CHUNK):
            total = total.to(self.q.device) + self._softmax(slice(start, start + _MEAN_CHUNK)).sum(2)
        return total / self.q.shape[2]

    def _softmax(self, queries: slice) -> Tensor:
        q, k = widen(self.q[:, :, queries]), widen(self.k)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if k.shape[1] != q.shape[1] else k  # grouped queries
        scale = self.scale if self.scale is not None else 1 / math.sqrt(q.shape[-1])
        scores = (q * scale) @ k.transpose(-2, -1)  # (B, H, queries, K)
        if self.bias is not None:
            bias = self.bias[..., queries, :] if self.bias.ndim > 1 and self.bias.shape[-2] > 1 else self.bias
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        if self.causal:
            index = torch.arange(self.q.shape[2], device=q.device)[queries]
            scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > index[:, None], -math.inf)
        return scores.softmax(-1)

    def output_row(self, out: Tensor, query: Query) -> Tensor:
        """The operation's own result for the same query: (B, H, D)."""
        batch, heads, length, _ = self.q.shape
        dims = (batch, heads, length, -1) if self.heads_first else (batch, length, heads, -1)
        out = out.reshape(dims)
        out = out if self.heads_first else out.transpose(1, 2)
        return widen(out).mean(2) if query == "mean" else widen(out[:, :, int(query)])


def widen(x: Tensor) -> Tensor:
    """Half precisions to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def relative_error(rows: Tensor, values: Tensor, output: Tensor) -> float:
    """Largest |row·V - output| over the largest sum of |row|·|V| of its channel: 0 exact, ~1 unrelated.

    The denominator is the bound that floating-point summation itself obeys, so the tolerance only depends on the
    precision of the output and not on the number of tokens.
    """
    values = widen(values).to(rows.dtype)
    if values.shape[1] != rows.shape[1]:
        values = values.repeat_interleave(rows.shape[1] // values.shape[1], 1)
    expected = (rows[:, :, None] @ values)[:, :, 0]  # (B, H, D)
    bound = (rows[:, :, None].abs() @ values.abs())[:, :, 0].amax((0, 1))  # (D,)
    error = (expected - output).abs().amax((0, 1)) / bound.clamp_min(torch.finfo(rows.dtype).tiny)
    return float(error.max())


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """What precision allows; float32 products on CUDA may run in TF32, whose mantissa is that of float16."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        dtype = torch.float16
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


@functools.lru_cache(maxsize=256)
def _argument_names(func: Any) -> tuple[str, ...]:
    schema = getattr(func, "_schema", None)
    return tuple(a.name for a in schema.arguments) if schema is not None else ()


def is_fused(func: Any) -> bool:
    """PyTorch's own fused attention operations, all of which are (B, H, N, D)."""
    return getattr(func, "namespace", "") == "aten" and "_scaled_dot_product_" in str(func)


def may_be_fused(func: Any, args: tuple[Any, ...]) -> bool:
    """An operation from outside ATen whose first arguments look like q, k, v or like packed qkv."""
    if getattr(func, "namespace", "") in ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional"):
        return False
    return _unknown_qkv(args) is not None or _packed_qkv(args) is not None


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


def _unknown_qkv(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
    tensors = [a for a in args if isinstance(a, Tensor)][:3]
    if len(tensors) < 3 or any(t.ndim != 4 or not t.is_floating_point() for t in tensors):
        return None
    q, k, v = tensors
    return (q, k, v) if k.shape == v.shape and q.shape[-1] == k.shape[-1] and q.shape[0] == k.shape[0] else None


def _packed_qkv(args: tuple[Any, ...]) -> Tensor | None:
    first = next((a for a in args if isinstance(a, Tensor)), None)
    return first if first is not None and first.ndim == 5 and 3 in first.shape[:4] else None


def _guesses(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[FusedCall]:
    """Every reading of an unknown operation: layouts times scales. Only one that passes the check counts."""
    triples: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    unpacked = _unknown_qkv(args)
    if unpacked is not None:
        q, k, v = unpacked
        triples += [(q, k, v, True), (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), False)]
    elif (packed := _packed_qkv(args)) is not None:
        for dim in (d for d in range(4) if packed.shape[d] == 3):
            q, k, v = packed.unbind(dim)
            triples += [(q, k, v, True), (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), False)]
    # The scale, if the operation was told one, is among its float arguments.
    told = [a for a in (*args, *kwargs.values()) if isinstance(a, float) and a > 0]
    for q, k, v, heads_first in triples:
        for scale in dict.fromkeys([1 / math.sqrt(q.shape[-1]), 1.0, *told]):
            for causal in (False, True) if q.shape[2] == k.shape[2] else (False,):
                yield FusedCall(str(func), q, k, v, causal=causal, scale=scale, heads_first=heads_first)


def observe_fused(call: FusedCall, out: Any, query: Query, *, verify: bool) -> Observation:
    """Rows of a fused operation, checked against the operation's own output unless ``verify`` is off."""
    batch, heads, length, _ = call.q.shape
    seen = Observation(call.op, batch, heads, length, call.k.shape[2], values=call.v)
    if query != "mean" and int(query) >= length:
        seen.problem = f"it has {length} queries, so no query {query}"
        return seen
    seen.rows = call.rows(query)
    if verify:
        result = out if isinstance(out, Tensor) else out[0]
        seen.error = relative_error(seen.rows, call.v, call.output_row(result, query))
        seen.tolerance = tolerance(result.dtype, result.device)
    return seen


def observe_unknown(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, query: Query
) -> Observation | None:
    """The reading of an unknown operation that reproduces its output best, or the reason why none does.

    None when the output cannot be attention at all (no tensor, or another number of elements than q).
    """
    result = out if isinstance(out, Tensor) else next((o for o in out or () if isinstance(o, Tensor)), None)
    best: Observation | None = None
    for call in _guesses(func, args, kwargs):
        if result is None or result.numel() != call.q.numel() // call.q.shape[-1] * call.v.shape[-1]:
            continue
        if query != "mean" and int(query) >= call.q.shape[2]:
            continue
        seen = observe_fused(call, result, query, verify=True)
        if best is None or (seen.error is not None and best.error is not None and seen.error < best.error):
            best = seen
    return best


class PendingSoftmax:
    """A softmax over the last dimension of a (..., Q, K) tensor, waiting for its product with V."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def matches(self, left: Tensor) -> bool:
        """Whether the left operand of a batched product has this softmax's shape."""
        return left.shape[-2:] == self.weights.shape[-2:] and left.numel() == self.weights.numel()


def pending_softmax(func: Any, args: tuple[Any, ...], out: Any) -> PendingSoftmax | None:
    """A softmax that could be attention: at least (batch, queries, keys), over the last dimension."""
    if not isinstance(out, Tensor) or out.ndim < 3 or args[1] not in (-1, out.ndim - 1):
        return None
    return PendingSoftmax(out)


def _row(weights: Tensor, query: Query) -> Tensor:
    return widen(weights).mean(-2) if query == "mean" else widen(weights[..., int(query), :])


def observe_explicit(
    candidates: list[PendingSoftmax], args: tuple[Any, ...], images: int, query: Query
) -> Observation | None:
    """Rows of explicit attention, from the softmax and from the operand that really meets V.

    ``candidates`` are the softmaxes since the last product. The row shown is the operand's when it is still a
    distribution (plain attention, or a mix of distributions), else the softmax's, marked as mixed.
    """
    left, right = args[0], args[1]
    fitting = [c for c in candidates if c.matches(left)]
    if not fitting:  # einsum may put V first: (D, K) times (K, Q)
        left, right = right.transpose(-2, -1), left.transpose(-2, -1)
        fitting = [c for c in candidates if c.matches(left)]
    if not fitting:
        return None
    lead, (queries, keys) = fitting[-1].weights.shape[:-2], left.shape[-2:]
    batch, heads = _batch_and_heads(lead, images)
    seen = Observation("softmax -> bmm", batch, heads, queries, keys)
    if query != "mean" and int(query) >= queries:
        seen.problem = f"it has {queries} queries, so no query {query}"
        return seen
    applied = _row(left.reshape(*lead, queries, keys), query)
    softmaxes = [_row(c.weights, query).expand_as(applied) for c in fitting]
    limit = 8 * torch.finfo(left.dtype).eps
    errors = [float(((applied - s).abs() / s.clamp_min(1 / keys)).max()) for s in softmaxes]
    best = min(range(len(errors)), key=errors.__getitem__)
    seen.mixed = not errors[best] <= limit
    distribution = bool((applied.sum(-1) - 1).abs().max() <= 0.02) and bool((applied >= 0).all())
    rows = applied if distribution or not seen.mixed else softmaxes[-1]
    seen.rows = rows.reshape(batch, heads, keys).clone()
    seen.values = right.reshape(batch, heads, keys, -1)
    seen.error, seen.tolerance = (0.0 if seen.mixed else errors[best]), limit
    return seen


def _batch_and_heads(lead: torch.Size, images: int) -> tuple[int, int]:
    """(B, H) of the leading dimensions: (B, H), (B·H,), or more dimensions when attention is windowed."""
    total = math.prod(lead)
    if len(lead) == 1:
        return (images, total // images) if total % images == 0 else (total, 1)
    return lead[0], total // lead[0]
