"""Read attention kernels from outside PyTorch, of which only the arguments are known.

Each way in which its tensors could be q, k and v is a candidate; the one that best
explains the kernel's result is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.attention_rows import CallingConvention, Query
from attn_monitor.capture.kinds.attention_product import AttentionProduct
from attn_monitor.capture.kinds.fused import FusedCall
from attn_monitor.capture.kinds.kind import AttentionCall, AttentionKind, Operation
from attn_monitor.capture.observation import Observation, ReadObservation

_OWN = ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional")  # namespaces without foreign kernels


class ForeignAttention(AttentionKind):
    """Recognise attention among operations from outside PyTorch by the shapes of their arguments and result."""

    @staticmethod
    def concerns(func: Any) -> bool:
        """Return whether the operation is from outside PyTorch."""
        return getattr(func, "namespace", "") not in _OWN

    def run(self, operation: Operation) -> tuple[Any, ForeignCall | None]:
        """Run the operation, and find the ways in which it could be attention."""
        out = operation.run()
        candidates = _candidates(operation, out)
        return out, ForeignCall(operation, candidates) if candidates else None


@dataclass
class ForeignCall(AttentionCall):
    """Hold an operation and the ways in which it could be attention, at least one."""

    operation: Operation
    candidates: list[FusedCall]

    def read(self, query: Query, *, verify: bool, convention: CallingConvention | None) -> Observation:
        """Read rows by the convention, or find the one that best explains the result on random q, k and v.

        They are compared with the result always, because the convention may be wrong.
        """
        convention = convention or self._convention_of_kernel() or _best_convention(self.candidates)
        call = self._by(convention)
        seen = call.read(query, verify=True)
        return replace(seen, convention=call.convention) if isinstance(seen, ReadObservation) else seen

    def product(self, convention: CallingConvention | None) -> AttentionProduct:
        """Return the operands by this convention, and the result."""
        return self._by(convention).product()

    def _by(self, convention: CallingConvention | None) -> FusedCall:
        return next((call for call in self.candidates if call.convention == convention), self.candidates[0])

    def _convention_of_kernel(self) -> CallingConvention | None:
        """Find the convention on random q, k and v, whose attention is sharp: near-uniform attention fits many."""
        func, args, kwargs = self.operation.func, self.operation.args, self.operation.kwargs
        count = 1 if _separate_qkv(args) is None else 3
        sharp = list(args)
        for i in [i for i, a in enumerate(args) if isinstance(a, Tensor)][:count]:
            noise = torch.randn(args[i].shape, generator=torch.Generator().manual_seed(i))
            sharp[i] = torch.empty_like(args[i]).copy_(2 * noise)
        try:
            out = func(*sharp, **kwargs)
        except Exception:  # the kernel may reject random tensors; then the model's own are used
            return None
        return _best_convention(_candidates(Operation(func, tuple(sharp), kwargs), out))


def _candidates(operation: Operation, out: Any) -> list[FusedCall]:
    """Return the attention calls that fit the size of an operation's result; empty if it is not attention."""
    result = out if isinstance(out, Tensor) else next((o for o in out or () if isinstance(o, Tensor)), None)
    if result is None:
        return []
    calls = _possible_calls(operation, result)
    return [call for call in calls if result.numel() == call.q.numel() // call.q.shape[-1] * call.v.shape[-1]]


def _separate_qkv(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
    tensors = [a for a in args if isinstance(a, Tensor)][:3]
    if len(tensors) < 3 or any(t.ndim != 4 or not t.is_floating_point() for t in tensors):
        return None
    q, k, v = tensors
    return (q, k, v) if k.shape == v.shape and q.shape[-1] == k.shape[-1] and q.shape[0] == k.shape[0] else None


def _packed_qkv(args: tuple[Any, ...]) -> Tensor | None:
    first = next((a for a in args if isinstance(a, Tensor)), None)
    return first if first is not None and first.ndim == 5 and 3 in first.shape[:4] else None


def _possible_calls(operation: Operation, result: Tensor) -> Iterator[FusedCall]:
    """Yield every convention that fits the arguments: layouts times scales times masks."""
    separate, packed = _separate_qkv(operation.args), _packed_qkv(operation.args)
    if separate is not None:
        triples = {-1: separate}
    elif packed is not None:
        splits = ((dim, packed.unbind(dim)) for dim in range(4) if packed.shape[dim] == 3)
        triples = {dim: (q, k, v) for dim, (q, k, v) in splits}
    else:
        return
    # A scale may be among the float arguments.
    given = [a for a in (*operation.args, *operation.kwargs.values()) if isinstance(a, float) and a > 0]
    for (dim, triple), tokens_first in itertools.product(triples.items(), (False, True)):
        q, k, v = (t.transpose(1, 2) for t in triple) if tokens_first else triple
        scales = dict.fromkeys([1 / math.sqrt(q.shape[-1]), 1.0, *given])
        causal = (False, True) if q.shape[2] == k.shape[2] else (False,)
        for scale, is_causal, heads_first in itertools.product(scales, causal, (True, False)):
            convention = CallingConvention(dim, tokens_first, scale, is_causal, heads_first)
            yield FusedCall(str(operation.func), q, k, v, result, None, is_causal, scale, heads_first, convention)


def _best_convention(calls: list[FusedCall]) -> CallingConvention | None:
    def error(call: FusedCall) -> float:
        # Weight the first query like all together: it may be the only one that an unknown mask leaves alone.
        seen = (call.read(query, verify=True) for query in ("mean", 0))
        errors = [float(s.error) for s in seen if isinstance(s, ReadObservation) and s.error is not None]
        return sum(errors) if errors else math.inf

    return min(calls, key=error).convention if calls else None
