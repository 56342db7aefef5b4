"""Read attention kernels that receive q, k and v, within PyTorch and outside of it.

Their layout is not known. Each way in which the tensors could be queries, keys, values and a result is a candidate; the
one that best explains the kernel's result on random, sharp q, k and v is used.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attn_monitor.capture.observe.attention_rows import Query
from attn_monitor.capture.observe.kinds.attention_product import AttentionProduct
from attn_monitor.capture.observe.kinds.fused import CallingConvention, FusedAttention, FusedCall
from attn_monitor.capture.observe.kinds.kernel_arguments import KernelOptions, several_lengths
from attn_monitor.capture.observe.kinds.kernel_conventions import possible_calls, results_of
from attn_monitor.capture.observe.kinds.kernel_examination import ExaminedKernel, examine
from attn_monitor.capture.observe.kinds.kind import AttentionCall, AttentionKind, Operation
from attn_monitor.capture.observe.observation import Observation, RefusedObservation

_OWN = ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional")  # namespaces without foreign kernels
_KERNELS: dict[tuple[Any, Hashable], ExaminedKernel] = {}  # a few hundred bytes for each kernel and shapes of arguments
_REFUSED: set[Any] = set()  # attention of which no rows can be read


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
        given = operation.with_copies(operation.written)  # it may write its result to q
        out = operation.run()
        call = kernel_call(given, results_of(operation, out))
        if call is None:
            self.state.unknown.add(str(operation.func))
        return out, call


def known_kernels() -> set[Any]:
    """Return the operations and functions that were found to be attention."""
    return {key[0] for key, kernel in _KERNELS.items() if kernel.attends} | _REFUSED


def function_call(operation: Operation, out: Any) -> AttentionCall | None:
    """Interpret an autograd function that has run as attention; return None where it mixes no tokens."""
    return kernel_call(operation, results_of(operation, out))


def kernel_call(operation: Operation, results: Sequence[Tensor]) -> AttentionCall | None:
    """Interpret an operation as attention, by its arguments before it ran; return None where it mixes no tokens."""
    facts = [(name, _fact(value)) for name, value in operation.named.items()]
    mask = operation.named.get("custom_mask_type")  # the one number that says how queries and keys meet
    key = operation.func, (mask, *facts, *((result.shape, result.is_contiguous()) for result in results))
    if key not in _KERNELS:
        options = KernelOptions.of(operation.named)
        candidates = [*possible_calls(operation, options, results)]
        if candidates and (reason := _not_read(options)):
            _REFUSED.add(operation.func)
            return RefusedKernel.of(candidates, reason)
        if not candidates and options.lengths is not None:  # other lengths may fit
            return None
        _KERNELS[key] = examine(operation, candidates)
    kernel = _KERNELS[key]
    return KernelCall(operation, results, kernel.convention) if kernel.attends else None


def _fact(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device.type
    if isinstance(value, (list, tuple)):
        return tuple(_fact(item) for item in value)
    if isinstance(value, float):  # a learned scale is another number in each step
        return "float", value > 0
    return value if isinstance(value, (bool, str, type(None))) else str(type(value))  # a seed is another in each call


def _not_read(options: KernelOptions) -> str:
    return f"it is given {options.not_read}, which is not read" if options.not_read else several_lengths(options)


@dataclass
class KernelCall(AttentionCall):
    """Hold a kernel that is attention; its arguments are read only if rows are wanted, as lengths are on the device."""

    operation: Operation
    results: Sequence[Tensor]
    convention: CallingConvention | None

    def read(self, query: Query, *, verify: bool) -> Observation:
        """Read rows and compare them with the result, see `AttentionCall.read`."""
        return self._call.read(query, verify=verify)

    def product(self) -> AttentionProduct:
        """Return the operands and the result."""
        return self._call.product()

    @functools.cached_property
    def _call(self) -> FusedCall | RefusedKernel:
        options = KernelOptions.of(self.operation.named)
        candidates = [*possible_calls(self.operation, options, self.results)]
        if not candidates:  # with other lengths before, they fitted
            return RefusedKernel.unfit(self.operation, self.results[0])
        if reason := _not_read(options):
            return RefusedKernel.of(candidates, reason)
        return next((call for call in candidates if call.convention == self.convention), candidates[0])


@dataclass
class RefusedKernel(AttentionCall):
    """Hold a kernel of which no rows can be read, with the reason."""

    refusal: RefusedObservation
    operands: AttentionProduct

    @staticmethod
    def of(candidates: Sequence[FusedCall], reason: str) -> RefusedKernel:
        """Take the result to be laid out like q, which takes its place where attention is ablated."""
        alike = (c for c in candidates if c.convention and c.convention.tokens_first != c.convention.heads_first_out)
        call = next(alike, candidates[0])
        shape: dict[str, Any] = {"batch": 1, "heads": call.q.shape[1], "queries": call.q.shape[2]}
        refusal = RefusedObservation(op=call.op, keys=call.k.shape[2], reason=reason, **shape)
        return RefusedKernel(refusal, call.product())

    @staticmethod
    def unfit(operation: Operation, result: Tensor) -> RefusedKernel:
        """Refuse packed sequences that do not fill the arguments, so that queries and keys are unknown."""
        reason = "its packed sequences do not fill the tensors that hold them, and have no rows of one length"
        refusal = RefusedObservation(op=operation.name, batch=1, heads=1, queries=0, keys=0, reason=reason)
        return RefusedKernel(refusal, AttentionProduct(result, result.shape[:-1], None, None, result))

    def read(self, query: Query, *, verify: bool) -> Observation:
        """Return the reason."""
        return self.refusal

    def product(self) -> AttentionProduct:
        """Return the operands and the result."""
        return self.operands
