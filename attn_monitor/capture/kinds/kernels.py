"""Read attention kernels that receive q, k and v, within PyTorch and outside of it.

Their layout is not known. Each way in which the tensors could be queries, keys, values and a result is a candidate; the
one that best explains the kernel's result on random, sharp q, k and v is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.attention_rows import Query
from attn_monitor.capture.kinds.attention_product import AttentionProduct
from attn_monitor.capture.kinds.fused import CallingConvention, FusedAttention, FusedCall
from attn_monitor.capture.kinds.kernel_arguments import KernelOptions, possible_qkv, several_lengths
from attn_monitor.capture.kinds.kind import AttentionCall, AttentionKind, Operation
from attn_monitor.capture.observation import Observation, ReadObservation, RefusedObservation

_OWN = ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional")  # namespaces without foreign kernels
_MIXES = 1e-2  # change of other tokens' results, in standard deviations, by which a kernel mixes tokens


class KernelAttention(AttentionKind):
    """Recognise operations from outside PyTorch, and inner ones of PyTorch, whose arguments look like q, k and v."""

    @staticmethod
    def concerns(func: Any) -> bool:
        """Return whether the operation could be an attention kernel."""
        if FusedAttention.concerns(func) or "backward" in str(func):
            return False
        names = {a.name for a in func._schema.arguments} if hasattr(func, "_schema") else set()
        return getattr(func, "namespace", "") not in _OWN or {"query", "key", "value"} <= names

    def run(self, operation: Operation) -> tuple[Any, AttentionCall | None]:
        """Run the operation and interpret it as attention."""
        out = operation.run()
        call = kernel_call(operation, out)
        if call is None:
            self.state.unknown.add(str(operation.func))
        return out, call


def kernel_call(operation: Operation, out: Any) -> AttentionCall | None:
    """Interpret an operation that has run as attention; return None where it mixes no tokens."""
    candidates = _candidates(operation, out)
    if not candidates:
        return None
    options = KernelOptions.of(operation.named)
    first, reason = candidates[0], several_lengths(options)
    if options.not_read:
        reason = f"it is given {options.not_read}, which is not read"
    if reason:
        return RefusedKernel(first, reason)
    kernel = _examined(operation, candidates)
    if not kernel.mixes:
        return None
    return next((call for call in candidates if call.convention == kernel.convention), first)


@dataclass
class RefusedKernel(AttentionCall):
    """Hold a kernel of which no rows can be read, and the reason."""

    call: FusedCall
    reason: str

    def read(self, query: Query, *, verify: bool) -> Observation:
        """Return the reason."""
        shape: dict[str, Any] = {"batch": 1, "heads": self.call.q.shape[1], "queries": self.call.q.shape[2]}
        return RefusedObservation(op=self.call.op, keys=self.call.k.shape[2], reason=self.reason, **shape)

    def product(self) -> AttentionProduct:
        """Return the operands and the result."""
        return self.call.product()


@dataclass(frozen=True)
class _Kernel:
    """Hold what random q, k and v have shown of a kernel."""

    mixes: bool
    convention: CallingConvention | None


_KERNELS: dict[tuple[Any, Hashable], _Kernel] = {}  # a few hundred bytes for each kernel and shape of its arguments


def known_kernels() -> set[Any]:
    """Return the operations and functions that were found to be attention."""
    return {key[0] for key, kernel in _KERNELS.items() if kernel.mixes}


def _examined(operation: Operation, candidates: Sequence[FusedCall]) -> _Kernel:
    """Examine a kernel on random q, k and v, once for each shape of its arguments."""
    key = operation.func, tuple((name, _fact(value)) for name, value in operation.named.items())
    if key not in _KERNELS:
        _KERNELS[key] = _examine(operation) or _Kernel(True, _best_convention(candidates))
    return _KERNELS[key]


def _fact(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device.type
    return value if isinstance(value, (int, float, bool, str, type(None))) else str(type(value))


def _examine(operation: Operation) -> _Kernel | None:
    """Find the convention on random q, k and v, whose attention is sharp: near-uniform attention fits many.

    Returns None where the kernel rejects such tensors.
    """
    # All tensors are copied, as the kernel may write to any of them.
    named = {name: a.clone() if isinstance(a, Tensor) else a for name, a in operation.named.items()}
    sharp = operation.with_arguments(named)
    for _, qkv in itertools.islice(possible_qkv(named, KernelOptions.of(named)), 1):
        for number, tensor in enumerate(qkv):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
            tensor.copy_(2 * noise)
    try:
        candidates = _candidates(sharp, sharp.run())
        convention = _best_convention(candidates)
        mixes = any(_mixes(sharp, tokens_first) for tokens_first in (False, True))
    except Exception:  # the kernel may reject random tensors; then the model's own are used
        return None
    return _Kernel(mixes, convention)


def _mixes(operation: Operation, tokens_first: bool) -> bool:
    """Return whether a change of the first token's V changes the results of other tokens, however they are laid out."""

    def calls() -> dict[CallingConvention, FusedCall]:
        found = {c.convention: c for c in _candidates(operation, operation.run()) if c.convention is not None}
        return {convention: call for convention, call in found.items() if convention.tokens_first == tokens_first}

    known = calls()
    before = {convention: call.result.clone() for convention, call in known.items()}  # may be written to again
    values = next((call.v for call in known.values()), None)
    if values is None or values.shape[2] == 1:
        return False
    values[:, :, 0] *= 100  # a view of the operation's argument
    after = {convention: call.result for convention, call in calls().items()}
    values[:, :, 0] /= 100
    changes = [(after[layout] - before[layout])[:, :, 1:].abs() > _MIXES * before[layout].std() for layout in before]
    return all(bool(change.any()) for change in changes)


def _candidates(operation: Operation, out: Any) -> list[FusedCall]:
    """Return the attention calls that fit the shapes of an operation; empty if it is not attention."""
    result = _result(operation, out)
    return [] if result is None else list(_possible_calls(operation, result))


def _result(operation: Operation, out: Any) -> Tensor | None:
    """Return the first tensor that an operation returned, or else wrote to."""
    if isinstance(out, Tensor):
        return out
    written = [operation.named.get(name) for name in operation.written]
    return next((t for t in (*(out or ()), *written) if isinstance(t, Tensor)), None)


def _possible_calls(operation: Operation, result: Tensor) -> Iterator[FusedCall]:
    """Yield every convention that fits the arguments: layouts times scales times masks."""
    options = KernelOptions.of(operation.named)
    numbers = [a for a in operation.named.values() if isinstance(a, float) and a > 0]
    layouts = (False, True) if options.lengths is None else (True,)
    for (dim, qkv), tokens_first in itertools.product(possible_qkv(operation.named, options), layouts):
        q, k, v = (t.transpose(1, 2) for t in qkv) if tokens_first else qkv
        if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:  # heads of queries share heads of keys
            continue
        others = dict.fromkeys([1 / math.sqrt(q.shape[-1]), 1.0, *numbers])
        scales = others if options.scale is None else [options.scale]
        either = (False, True) if q.shape[2] == k.shape[2] else (False,)
        causal = either if options.causal is None else (options.causal,)
        if not _fit(options, q.shape[1], q.shape[2], k.shape[2]):
            continue
        for heads_first, view in _views(result, q.shape[:-1], v.shape[-1]):
            for scale, is_causal in itertools.product(scales, causal):
                yield FusedCall(
                    operation.name,
                    q,
                    k,
                    v,
                    view,
                    bias=options.bias,
                    causal=is_causal,
                    scale=scale,
                    window=options.window,
                    softcap=options.softcap,
                    alibi=options.alibi,
                    sinks=options.sinks,
                    convention=CallingConvention(dim, tokens_first, scale, is_causal, heads_first),
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


def _best_convention(calls: Sequence[FusedCall]) -> CallingConvention | None:
    def error(call: FusedCall) -> float:
        # Weight the first query like all together: it may be the only one that an unknown mask leaves alone.
        seen = (call.read(query, verify=True) for query in ("mean", 0))
        errors = [float(s.error) for s in seen if isinstance(s, ReadObservation) and s.error is not None]
        return sum(errors) if errors else math.inf

    return min(calls, key=error).convention if calls else None
