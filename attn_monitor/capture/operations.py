"""Recognise attention among the operations that PyTorch runs, and read single rows of it.

Two forms exist once a model has been dispatched to ATen. *Fused* operations receive q, k and v; the rows asked
for are recomputed from q and k in float32. *Explicit* attention is a softmax (or other weights made of scores) that
later becomes the left operand of the product with V; the rows are sliced from that operand. Whatever came before
(RoPE, q/k norm, masks, autocast) has been applied by then, so nothing here depends on the library that a model comes
from.
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

from attn_monitor.attention import RowKind
from attn_monitor.capture.rows import (
    AttentionSource,
    ExplicitCall,
    Folding,
    FusedCall,
    Query,
    Reading,
    Regrouped,
    read_rows,
    regroup,
    widen,
    widened,
)

aten = torch.ops.aten

SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
ELEMENTWISE = {aten.sigmoid.default, aten.relu.default}  # make weights of scores where there is no softmax
PRODUCT = {aten.bmm.default, aten.baddbmm.default}
_OWN = ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional")  # namespaces without foreign kernels

# Relative to what the output's own precision allows: sums of |row|·|V|, see `relative_error`.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 8e-3}


@dataclass
class Observation:
    """One attention operation as it ran: its shape, and the rows that were asked for.

    ``rows`` is (B, H, K) float32 and ``values`` (B, H, K, D); both None when ``problem`` says why not.
    ``error`` is the largest relative difference between what the rows imply and what the model computed, ``mixed``
    marks attention that is not applied as the softmax gave it (talking heads, gated mixes): both stay on the device
    until `settle`, so that reading does not make a GPU wait. ``scope`` is the path of the module in which all of it
    ran, and ``reading`` says which reading of an unknown operation this is.
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
    scope: str = ""
    reading: Reading | None = None

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
    """What an observation's checks came to, as plain values."""

    finite: bool
    error: float  # NaN: not checked
    mixed: bool
    kind: RowKind


def settle(observations: Sequence[Observation]) -> list[Verdict]:
    """Fetch the checks of all observations from the device at once."""
    facts = []
    for seen in observations:
        assert seen.rows is not None
        nothing = seen.rows.new_full((), math.nan)
        facts += [seen.rows.isfinite().all(), *(nothing if f is None else f for f in (seen.error, seen.mixed))]
        explicit = seen.mixed is not None  # what a fused operation applies is a softmax
        facts += [seen.rows.amin(), (seen.rows.sum(-1) - 1).abs().amax()] if explicit else [nothing, nothing]
    numbers = torch.stack([f.float() for f in facts]).tolist() if facts else []
    return [_verdict(*numbers[i : i + 5]) for i in range(0, len(numbers), 5)]


def _verdict(finite: float, error: float, mixed: float, lowest: float, apart: float) -> Verdict:
    kind: RowKind = "signed" if lowest < -1e-6 else "weights" if apart > 0.02 else "distribution"
    return Verdict(finite == 1, error, mixed == 1, kind)


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
    """What an operation could be to attention; nothing where it is none of these.

    "fused", "softmax", "elementwise", "product", "convolution" or "foreign".

    Fused are PyTorch's own attention operations, all of which are (B, H, N, D). Foreign operations are from outside
    ATen, and may be somebody's attention kernel.
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
        triples = {-1: unpacked}
    elif packed is not None:
        splits = ((dim, packed.unbind(dim)) for dim in range(4) if packed.shape[dim] == 3)
        triples = {dim: (q, k, v) for dim, (q, k, v) in splits}
    else:
        return
    # The scale, if the operation was told one, is among its float arguments.
    told = [a for a in (*args, *kwargs.values()) if isinstance(a, float) and a > 0]
    for (dim, triple), swapped in itertools.product(triples.items(), (False, True)):
        q, k, v = (t.transpose(1, 2) for t in triple) if swapped else triple
        scales = dict.fromkeys([1 / math.sqrt(q.shape[-1]), 1.0, *told])
        causal = (False, True) if q.shape[2] == k.shape[2] else (False,)
        for scale, is_causal, heads_first in itertools.product(scales, causal, (True, False)):
            reading = (dim, swapped, scale, is_causal, heads_first)
            yield FusedCall(str(func), q, k, v, None, is_causal, scale, heads_first, reading)


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
    result = first_tensor(out)
    if result is None:
        return []
    return [
        call
        for call in _guesses(func, args, kwargs)
        if result.numel() == call.q.numel() // call.q.shape[-1] * call.v.shape[-1]
    ]


def observe_unknown(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], calls: Sequence[FusedCall], out: Any, query: Query,
    reading: Reading | None,
) -> Observation:  # fmt: skip
    """The given reading, else the one that explains best what the kernel makes of sharp made-up q, k and v."""
    if reading is None:
        reading = _best_reading(calls, out) if (asked := _ask_kernel(func, args, kwargs)) is None else asked
    call = reading_of(calls, reading)
    return replace(observe_fused(call, first_tensor(out), query, verify=True), reading=call.reading)


def reading_of(calls: Sequence[FusedCall], reading: Reading | None) -> FusedCall:
    """The call that is read so."""
    return next((call for call in calls if call.reading == reading), calls[0])


def _ask_kernel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading | None:
    """Near-uniform attention would agree with many readings, attention to single keys agrees with one."""
    count = 1 if _unknown_qkv(args) is None else 3
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)][:count]
    sharp = list(args)
    for i in places:
        noise = torch.randn(args[i].shape, generator=torch.Generator().manual_seed(i))
        sharp[i] = torch.empty_like(args[i]).copy_(2 * noise)
    try:
        out = func(*sharp, **kwargs)
    except Exception:  # a kernel may ask more of its tensors than their shapes; then its own have to tell
        return None
    return _best_reading(unknown_calls(func, tuple(sharp), kwargs, out), out)


def _best_reading(calls: Sequence[FusedCall], out: Any) -> Reading | None:
    def error(call: FusedCall) -> float:
        seen = observe_fused(call, first_tensor(out), "mean", verify=True)
        other = observe_fused(call, first_tensor(out), 0, verify=True)
        errors = [float(s.error) for s in (seen, other) if s.error is not None]
        return max(errors, default=math.inf)

    return min(calls, key=error).reading if calls else None


def first_tensor(out: Any) -> Tensor | None:
    """The tensor itself, or the first one of a tuple."""
    return out if isinstance(out, Tensor) else next((o for o in out or () if isinstance(o, Tensor)), None)


def is_same(a: Any, b: Tensor) -> bool:
    """Whether both are the same numbers in memory, whatever their shape."""
    return isinstance(a, Tensor) and a.numel() == b.numel() and _pointer(a) == _pointer(b) is not None


def _pointer(x: Tensor) -> int | None:
    try:
        return x.data_ptr() or None
    except RuntimeError:  # a subclass without storage of its own
        return None


def attention_softmax(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Whether a softmax could be attention: at least (batch, queries, keys), over the last dimension."""
    return isinstance(out, Tensor) and out.ndim >= 3 and args[1] in (-1, out.ndim - 1)


def explicit_call(weights: Sequence[Tensor], args: tuple[Any, ...], images: int) -> ExplicitCall | None:
    """The batched product as attention, when its left operand has the shape of softmaxed scores before it."""
    for swapped, left, right in ((False, *args[:2]), (True, args[1].mT, args[0].mT)):  # einsum may put V first
        fitting = [w for w in weights if w.shape[-2:] == left.shape[-2:] and _fits(w, left, images)]
        if fitting:
            return ExplicitCall(fitting, left, right, swapped)
    return None


def _fits(weights: Tensor, left: Tensor, images: int) -> bool:
    """As many heads, or fewer where some were pruned."""
    heads, kept = (math.prod(t.shape[:-2]) for t in (weights, left))
    return heads == kept or (kept < heads and kept % images == 0)


def observe_explicit(call: ExplicitCall, out: Tensor, images: int, query: Query, *, verify: bool) -> Observation:
    """Rows of the operand that meets V, whether or not it is a softmax; it is mixed where it is not the one before."""
    lead = call.weights[-1].shape[:-2] if call.weights[-1].numel() == call.applied.numel() else call.applied.shape[:-2]
    queries, keys = call.applied.shape[-2:]
    batch, heads = _batch_and_heads(lead, images)
    seen = Observation("softmax -> bmm", batch, heads, queries, keys)
    seen.problem = _problem(query, queries, call.applied, call.values)
    if seen.problem:
        return seen
    applied = _lead_rows(call.applied, query)
    limit = 8 * torch.finfo(call.applied.dtype).eps
    rows = [_lead_rows(w, query).reshape(applied.shape) for w in call.weights if w.numel() == call.applied.numel()]
    apart = [((applied - w.to(applied.dtype)).abs() / w.clamp_min(1 / keys)).max() for w in rows]
    seen.mixed = ~(torch.stack(apart).min() <= limit) if apart else applied.new_ones((), dtype=torch.bool)
    call.shape = (batch, heads, queries, keys)
    seen.rows = applied.reshape(batch, heads, keys)
    seen.values, seen.source = call.values.reshape(batch, heads, keys, -1), call
    if verify:
        result = _lead_rows(out.mT if call.swapped else out, query)
        seen.error = relative_error(seen.rows, seen.values, result.reshape(batch, heads, -1))
        seen.tolerance = tolerance(out.dtype, out.device)
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
