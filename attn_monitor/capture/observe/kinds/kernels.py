"""Read attention kernels that receive q, k and v, within PyTorch and outside of it.

Their layout is not known. Each way in which the tensors could be queries, keys, values and a result is a candidate; the
one that best explains the kernel's result on random, sharp q, k and v is used.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from attn_monitor.capture.observe.attention_rows import Query
from attn_monitor.capture.observe.kinds.attention_product import AttentionProduct
from attn_monitor.capture.observe.kinds.fused import CallingConvention, FusedAttention, FusedCall
from attn_monitor.capture.observe.kinds.kernel_arguments import KernelOptions, possible_qkv, several_lengths
from attn_monitor.capture.observe.kinds.kind import AttentionCall, AttentionKind, Operation
from attn_monitor.capture.observe.observation import Observation, ReadObservation, RefusedObservation

_OWN = ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional")  # namespaces without foreign kernels
_MIXES = 1e-2  # relative change of results that counts


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
        given = _with_copies(operation, operation.written)  # it may write its result to q
        out = operation.run()
        call = kernel_call(given, _results(operation, out))
        if call is None:
            self.state.unknown.add(str(operation.func))
        return out, call


def function_call(operation: Operation, out: Any) -> AttentionCall | None:
    """Interpret an autograd function that has run as attention; return None where it mixes no tokens."""
    return kernel_call(operation, _results(operation, out))


def kernel_call(operation: Operation, results: Sequence[Tensor]) -> AttentionCall | None:
    """Interpret an operation, with the arguments of before it ran, as attention; None where it mixes no tokens."""
    facts = [(name, _fact(value)) for name, value in operation.named.items()]
    mask = operation.named.get("custom_mask_type")  # the one number that says how queries and keys meet
    key = operation.func, (mask, *facts, *((result.shape, result.is_contiguous()) for result in results))
    if key not in _KERNELS:
        options = KernelOptions.of(operation.named)
        candidates = [*_possible_calls(operation, options, results)]
        if candidates and (reason := _not_read(options)):
            _REFUSED.add(operation.func)
            return RefusedKernel.of(candidates, reason)
        if not candidates and options.lengths is not None:  # other lengths may fit
            return None
        _KERNELS[key] = _examine(operation, candidates)
    kernel = _KERNELS[key]
    return KernelCall(operation, results, kernel.convention) if kernel.attends else None


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
        candidates = [*_possible_calls(self.operation, options, self.results)]
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


@dataclass(frozen=True)
class _Kernel:
    """Hold what random q, k and v have shown of a kernel."""

    attends: bool
    convention: CallingConvention | None


_KERNELS: dict[tuple[Any, Hashable], _Kernel] = {}  # a few hundred bytes for each kernel and shape of its arguments

_REFUSED: set[Any] = set()  # attention of which no rows can be read


def known_kernels() -> set[Any]:
    """Return the operations and functions that were found to be attention."""
    return {key[0] for key, kernel in _KERNELS.items() if kernel.attends} | _REFUSED


def _fact(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device.type
    if isinstance(value, (list, tuple)):
        return tuple(_fact(item) for item in value)
    if isinstance(value, float):  # a learned scale is another number in each step
        return "float", value > 0
    return value if isinstance(value, (bool, str, type(None))) else str(type(value))  # a seed is another in each call


def _examine(operation: Operation, candidates: Sequence[FusedCall]) -> _Kernel:
    """Find the convention on random q, k and v, whose attention is sharp: near-uniform attention fits many.

    Where the kernel rejects such tensors, the model's own are used.
    """
    if not candidates:
        return _Kernel(False, None)
    sharp = _with_copies(operation, operation.named)
    for _, qkv in itertools.islice(possible_qkv(sharp, KernelOptions.of(sharp.named)), 1):
        for number, tensor in enumerate(qkv):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number), device="cpu")
            tensor.copy_(2 * noise)
    try:
        convention, explained = _best_convention(_tried(sharp))
        layouts = [tokens_first for tokens_first in (False, True) if _mixes(sharp, tokens_first)]
        # Scans mix tokens too.
        attends = bool(layouts) and (explained or any(_keeps_equal_tokens(sharp, layout) for layout in layouts))
    except Exception:
        return _Kernel(True, _best_convention(candidates)[0])
    return _Kernel(attends, convention)


def _tried(operation: Operation) -> list[FusedCall]:
    """Run an operation on copies, as it may write to any of its arguments, and interpret it in every way that fits."""
    trial = _with_copies(operation, operation.named)
    results = _results(trial, trial.run())
    return [*_possible_calls(operation, KernelOptions.of(operation.named), results)]


def _with_copies(operation: Operation, names: Collection[str]) -> Operation:
    """Return the operation with copies of the tensors among these arguments, also of those in lists."""
    copied = {
        name: tree_map_only(Tensor, torch.clone, value) if name in names else value
        for name, value in operation.named.items()
    }
    return operation.with_arguments(copied)


def _mixes(operation: Operation, tokens_first: bool) -> bool:
    """Return whether a change of the first token's V changes the results of other tokens, however they are laid out."""
    before = _by_convention(operation, tokens_first)
    values = next((call.v for call in before.values()), None)
    if values is None or values.shape[2] == 1:
        return False
    values[:, :, 0] *= 100  # a view of the operation's argument
    after = _by_convention(operation, tokens_first)
    values[:, :, 0] /= 100
    changes = [
        (after[layout].result - call.result)[:, :, 1:].abs() > _MIXES * call.result.std()
        for layout, call in before.items()
    ]
    return all(bool(change.any()) for change in changes)


def _by_convention(operation: Operation, tokens_first: bool) -> dict[CallingConvention, FusedCall]:
    calls = {call.convention: call for call in _tried(operation) if call.convention is not None}
    return {convention: call for convention, call in calls.items() if convention.tokens_first == tokens_first}


def _keeps_equal_tokens(operation: Operation, tokens_first: bool) -> bool:
    """Return whether equal tokens have equal results, as in any weighted mean, however they are laid out."""
    equal = _with_copies(operation, operation.named)
    for call in itertools.islice(_by_convention(equal, tokens_first).values(), 1):
        for tensor in (call.q, call.k, call.v):  # views of the operation's arguments
            tensor.copy_(tensor[:, :, :1].clone().expand_as(tensor))
    results = [call.result for call in _by_convention(equal, tokens_first).values()]
    return any(bool(((r - r[:, :, :1]).abs() <= _MIXES * r.abs().amax()).all()) for r in results)


def _results(operation: Operation, out: Any) -> list[Tensor]:
    """Return the tensors that an operation returned, and then those that it wrote to."""
    written = [operation.named.get(name) for name in operation.written]
    return [t for t in (*tree_leaves(out), *written) if isinstance(t, Tensor)]


def _possible_calls(operation: Operation, options: KernelOptions, results: Sequence[Tensor]) -> Iterator[FusedCall]:
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


def _best_convention(calls: Sequence[FusedCall]) -> tuple[CallingConvention | None, bool]:
    """Return the convention that best explains the results, and whether it does."""

    def error(call: FusedCall) -> float:
        # Weight the first query like all together: it may be the only one that an unknown mask leaves alone.
        seen = (call.read(query, verify=True) for query in ("mean", 0))
        errors = [float(s.error) for s in seen if isinstance(s, ReadObservation) and s.error is not None]
        return sum(errors) if errors else math.inf

    best = min(calls, key=error, default=None)
    return (None, False) if best is None else (best.convention, error(best) < _MIXES)
