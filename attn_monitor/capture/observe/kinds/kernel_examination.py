"""Find out by random q, k and v whether an operation is attention, and how it takes and returns its tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from attn_monitor.capture.observe.kinds.fused import CallingConvention, FusedCall
from attn_monitor.capture.observe.kinds.kernel_arguments import KernelOptions, possible_qkv
from attn_monitor.capture.observe.kinds.kernel_conventions import possible_calls, results_of
from attn_monitor.capture.observe.kinds.kind import Operation
from attn_monitor.capture.observe.observation import ReadObservation

_MIXES = 1e-2  # relative change of results that counts


class ExaminedKernel(NamedTuple):
    """Hold whether a kernel is attention, and the convention that best explains its results."""

    attends: bool
    convention: CallingConvention | None


def examine(operation: Operation, candidates: Sequence[FusedCall]) -> ExaminedKernel:
    """Find the convention on random q, k and v, whose attention is sharp: near-uniform attention fits many.

    Where the kernel rejects such tensors, the model's own are used.
    """
    if not candidates:
        return ExaminedKernel(False, None)
    sharp = operation.with_copies(operation.named)
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
        return ExaminedKernel(True, _best_convention(candidates)[0])
    return ExaminedKernel(attends, convention)


def _tried(operation: Operation) -> list[FusedCall]:
    """Run an operation on copies, as it may write to any of its arguments, and interpret it in every way that fits."""
    trial = operation.with_copies(operation.named)
    results = results_of(trial, trial.run())
    return [*possible_calls(operation, KernelOptions.of(operation.named), results)]


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
    equal = operation.with_copies(operation.named)
    for call in itertools.islice(_by_convention(equal, tokens_first).values(), 1):
        for tensor in (call.q, call.k, call.v):  # views of the operation's arguments
            tensor.copy_(tensor[:, :, :1].clone().expand_as(tensor))
    results = [call.result for call in _by_convention(equal, tokens_first).values()]
    return any(bool(((r - r[:, :, :1]).abs() <= _MIXES * r.abs().amax()).all()) for r in results)


def _best_convention(calls: Sequence[FusedCall]) -> tuple[CallingConvention | None, bool]:
    """Return the convention that best explains the results, and whether it does."""

    def error(call: FusedCall) -> float:
        # Weight the first query like all together: it may be the only one that an unknown mask leaves alone.
        seen = (call.read(query, verify=True) for query in ("mean", 0))
        errors = [float(s.error) for s in seen if isinstance(s, ReadObservation) and s.error is not None]
        return sum(errors) if errors else math.inf

    best = min(calls, key=error, default=None)
    return (None, False) if best is None else (best.convention, error(best) < _MIXES)
