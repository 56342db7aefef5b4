"""Recognise attention among the operations that PyTorch runs, and read single rows of it.

Two forms exist once a model has been dispatched to ATen. *Fused* operations receive q, k and v; the rows asked
for are recomputed from q and k in float32. *Explicit* attention is a softmax whose result later becomes the left
operand of the product with V; the rows are sliced from it. Whatever came before (RoPE, q/k norm, masks, autocast)
has been applied by then, so nothing here depends on the library that a model comes from.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.sources import (
    AttentionSource,
    ExplicitCall,
    Folding,
    FusedCall,
    Query,
    Regrouped,
    read_rows,
    regroup,
    widen,
    widened,
)

aten = torch.ops.aten

SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
PRODUCT = {aten.bmm.default}
_OWN = ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional")  # namespaces without foreign kernels

# Relative to what the output's own precision allows: sums of |row|·|V|, see `relative_error`.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass
class Observation:
    """One attention operation as it ran: its shape, and the rows that were asked for.

    ``rows`` is (B, H, K) float32 and ``values`` (B, H, K, D); both None when ``problem`` says why not.
    ``error`` is the largest relative difference between what the rows imply and what the model computed, ``mixed``
    marks attention that is not applied as the softmax gave it (talking heads, gated mixes): both stay on the device
    until `settle`, so that reading does not make a GPU wait.
    """

    op: str
    batch: int
    heads: int
    queries: int
    keys: int
    rows: Tensor | None = None
    values: Tensor | None = None
    source: AttentionSource | None = None
    error: Tensor | None = None
    tolerance: float = 0.0
    mixed: Tensor | None = None
    problem: str | None = None

    def regrouped(self, images: int, folding: Folding | None) -> Observation:
        """The same, read with batch and heads in another order; None leaves it as it is."""
        if folding is None:
            return self
        return replace(
            self,
            batch=images,
            heads=self.batch * self.heads // images,
            rows=None if self.rows is None else regroup(self.rows, images, folding),
            values=None if self.values is None else regroup(self.values, images, folding),
            source=None if self.source is None else Regrouped(self.source, images, folding),
        )


@dataclass(frozen=True)
class Verdict:
    """What an observation's checks came to, as plain numbers."""

    finite: bool
    error: float  # NaN: not checked
    mixed: bool


def settle(observations: Sequence[Observation]) -> list[Verdict]:
    """Fetch the checks of all observations from the device at once."""
    facts = []
    for seen in observations:
        assert seen.rows is not None
        nothing = seen.rows.new_full((), math.nan)
        mixed = seen.mixed if seen.mixed is not None else nothing
        facts += [seen.rows.isfinite().all(), seen.error if seen.error is not None else nothing, mixed]
    numbers = torch.stack([f.float() for f in facts]).tolist() if facts else []
    return [
        Verdict(finite == 1, error, mixed == 1)
        for finite, error, mixed in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    ]


def relative_error(rows: Tensor, values: Tensor, output: Tensor) -> Tensor:
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
    return error.max().nan_to_num(nan=math.inf)  # NaN is no agreement


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """What precision allows, for float32 that of the products which are made of it."""
    if dtype == torch.float32:
        dtype = _precision_of_products(device)
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def _precision_of_products(device: torch.device) -> torch.dtype:
    """float32 unless PyTorch was told to multiply float32 matrices in less; TF32 has the mantissa of float16."""
    backends = {"cuda": torch.backends.cuda.matmul, "cpu": getattr(torch.backends.mkldnn, "matmul", None)}
    backend = backends.get(device.type)
    setting = getattr(backend, "fp32_precision", None)  # what was told in either way; PyTorch 2.9 and newer
    if setting is None and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        setting = "tf32"  # only here, as reading this raises where the newer setting was used
    return {"tf32": torch.float16, "bf16": torch.bfloat16}.get(setting or "", torch.float32)


@functools.lru_cache(maxsize=256)
def _argument_names(func: Any) -> tuple[str, ...]:
    schema = getattr(func, "_schema", None)
    return tuple(a.name for a in schema.arguments) if schema is not None else ()


@functools.lru_cache(maxsize=1024)
def kind_of(func: Any) -> str:
    """What an operation could be to attention: "fused", "softmax", "product", "convolution", "foreign", or nothing.

    Fused are PyTorch's own attention operations, all of which are (B, H, N, D). Foreign operations are from outside
    ATen, and may be somebody's attention kernel.
    """
    if getattr(func, "namespace", "") not in _OWN:
        return "foreign"
    if func in SOFTMAX:
        return "softmax"
    if func in PRODUCT:
        return "product"
    if func is aten.convolution.default:
        return "convolution"
    return "fused" if "_scaled_dot_product_" in str(func) else ""


def looks_like_attention(args: tuple[Any, ...]) -> bool:
    """Whether the first arguments look like q, k, v or like packed qkv."""
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
    unpacked, packed = _unknown_qkv(args), _packed_qkv(args)
    if unpacked is not None:
        triples = [unpacked]
    elif packed is not None:
        splits = (packed.unbind(dim) for dim in range(4) if packed.shape[dim] == 3)
        triples = [(q, k, v) for q, k, v in splits]
    else:
        return
    triples += [(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)) for q, k, v in triples]
    # The scale, if the operation was told one, is among its float arguments.
    told = [a for a in (*args, *kwargs.values()) if isinstance(a, float) and a > 0]
    for q, k, v in triples:
        scales = dict.fromkeys([1 / math.sqrt(q.shape[-1]), 1.0, *told])
        causal = (False, True) if q.shape[2] == k.shape[2] else (False,)
        for scale, is_causal, heads_first in itertools.product(scales, causal, (True, False)):
            yield FusedCall(str(func), q, k, v, None, is_causal, scale, heads_first)


def _problem(query: Query, queries: int, *tensors: Tensor) -> str | None:
    """Why an operation cannot be read, whatever it computes."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"its tensors are {type(tensor).__name__}s (sharded over devices, or ragged), not plain tensors"
    if query != "mean" and int(query) >= queries:
        return f"it has {queries} queries, so no query {query}"
    return None


def observe_fused(call: FusedCall, out: Any, query: Query, *, verify: bool) -> Observation:
    """Rows of a fused operation, checked against the operation's own output unless ``verify`` is off."""
    if call.q.ndim != 4:
        problem = f"its q has {call.q.ndim} dimensions, not (batch, heads, tokens, channels)"
        return Observation(call.op, 1, 1, call.q.shape[-2], call.k.shape[-2], problem=problem)
    batch, heads, length, _ = call.q.shape
    seen = Observation(call.op, batch, heads, length, call.k.shape[2])
    seen.problem = _problem(query, length, call.q, call.k, call.v)
    if seen.problem:
        return seen
    seen.values, seen.source, seen.rows = call.v, call, read_rows(call, query, length)
    if verify:
        result = out if isinstance(out, Tensor) else out[0]
        seen.error = relative_error(seen.rows, call.v, call.output_row(result, query))
        seen.tolerance = tolerance(result.dtype, result.device)
    return seen


def unknown_calls(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[FusedCall]:
    """The readings under which an unknown operation's result has attention's size: none if it is something else."""
    result = _first_tensor(out)
    if result is None:
        return []
    return [
        call
        for call in _guesses(func, args, kwargs)
        if result.numel() == call.q.numel() // call.q.shape[-1] * call.v.shape[-1]
    ]


def observe_unknown(calls: list[FusedCall], out: Any, query: Query) -> Observation:
    """The reading that reproduces the operation's result best, whether or not that is well enough."""
    seen = [observe_fused(call, _first_tensor(out), query, verify=True) for call in calls]
    return min(seen, key=lambda s: math.inf if s.error is None or s.error.isnan() else float(s.error))


def _first_tensor(out: Any) -> Tensor | None:
    return out if isinstance(out, Tensor) else next((o for o in out or () if isinstance(o, Tensor)), None)


def attention_softmax(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Whether a softmax could be attention: at least (batch, queries, keys), over the last dimension."""
    return isinstance(out, Tensor) and out.ndim >= 3 and args[1] in (-1, out.ndim - 1)


def explicit_call(softmaxes: list[Tensor], args: tuple[Any, ...]) -> ExplicitCall | None:
    """The batched product as attention, when its left operand has the shape of a softmax before it."""
    for left, right in (args[:2], (args[1].mT, args[0].mT)):  # einsum may put V first: (D, K) times (K, Q)
        fitting = [s for s in softmaxes if s.shape[-2:] == left.shape[-2:] and s.numel() == left.numel()]
        if fitting:
            return ExplicitCall(fitting, left.reshape(fitting[-1].shape), right)
    return None


def observe_explicit(call: ExplicitCall, images: int, query: Query) -> Observation:
    """Rows of explicit attention, from the softmax and from the operand that really meets V.

    The row shown is the operand's when it is still a distribution (plain attention, or a mix of distributions),
    else the softmax's; it is mixed when the operand is no softmax, and then there is no error to tell.
    """
    *lead, queries, keys = call.applied.shape
    batch, heads = _batch_and_heads(lead, images)
    seen = Observation("softmax -> bmm", batch, heads, queries, keys)
    seen.problem = _problem(query, queries, call.applied, call.values)
    if seen.problem:
        return seen
    applied = _lead_rows(call.applied, query)
    limit = 8 * torch.finfo(call.applied.dtype).eps
    softmaxes = [_lead_rows(s, query).reshape(applied.shape).to(applied.dtype) for s in call.softmaxes]
    error = torch.stack([((applied - s).abs() / s.clamp_min(1 / keys)).max() for s in softmaxes]).min()
    seen.mixed = ~(error <= limit)
    distribution = ((applied.sum(-1) - 1).abs().max() <= 0.02) & (applied >= 0).all()
    call.as_applied = distribution | ~seen.mixed
    call.shape = (batch, heads, queries, keys)
    seen.rows = torch.where(call.as_applied, applied, softmaxes[-1]).reshape(batch, heads, keys)
    seen.values, seen.source = call.values.reshape(batch, heads, keys, -1), call
    seen.error, seen.tolerance = error.masked_fill(seen.mixed, math.nan), limit
    return seen


def _lead_rows(weights: Tensor, query: Query) -> Tensor:
    """(..., Q, K) to (..., K)."""
    return weights.mean(-2, dtype=widened(weights.dtype)) if query == "mean" else widen(weights[..., int(query), :])


def _batch_and_heads(lead: Sequence[int], images: int) -> tuple[int, int]:
    """(B, H) of the leading dimensions: (B, H), (B·H,), or more dimensions when attention is windowed."""
    total = math.prod(lead)
    if len(lead) == 1:
        return (images, total // images) if total % images == 0 else (total, 1)
    return lead[0], total // lead[0]
