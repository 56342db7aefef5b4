"""Read the arguments of attention kernels by their names, as the schemas and signatures of the kernels give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attn_monitor.capture.observe.kinds.kind import Operation
from attn_monitor.capture.observe.memory import fetched_once

_QKV = (("query", "key", "value"), ("q", "k", "v"))
_SCALE = ("scale", "softmax_scale", "sm_scale")
_CAUSAL = ("is_causal", "causal")
_BIAS = ("bias", "attn_bias", "attn_mask")
_LENGTHS = (
    ("cu_seqlens_q", "cu_seqlens_k"),
    ("cum_seq_q", "cum_seq_k"),
    ("cu_seq_q", "cu_seq_k"),
    ("cu_seqlens", "cu_seqlens"),
)
_SINKS = ("s_aux", "sinks", "sink", "learnable_sink")
_NOT_READ = {  # arguments that change which keys a query sees in a way that is not read
    "seqlen_k": "a length of keys for each image",
    "seqused_q": "a length of queries for each image",
    "seqused_k": "a length of keys for each image",
    "block_table": "paged keys",
    "page_table": "paged keys",
    "leftpad_k": "padding before the keys",
    "block_mask": "a block mask",
}


@dataclass(frozen=True)
class KernelOptions:
    """Hold what a kernel is given beside q, k and v; the defaults stand for what is absent.

    Attributes:
        scale: Factor of q·k, None where none is given.
        causal: Whether each query sees only the keys up to its own index, None where no argument says.
        bias: Added to the scores, or False where a key is masked.
        window: How many keys before and after its own index a query sees, -1 for all.
        softcap: Scores are softcap · tanh(score / softcap); 0 for none.
        alibi: (H,) or (B, H), slopes of a bias that falls with the distance between query and key.
        sinks: (H,) scores of a further column that takes part in the softmax and meets no V.
        lengths: Lengths of the queries' and the keys' sequences, where they are packed into one.
        not_read: What the kernel is given that is not read, in words; "" for nothing.
    """

    scale: float | None = None
    causal: bool | None = None
    bias: Tensor | None = None
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: Tensor | None = None
    sinks: Tensor | None = None
    lengths: tuple[Sequence[int], Sequence[int]] | None = None
    not_read: str = ""

    @staticmethod
    def of(named: Mapping[str, Any]) -> KernelOptions:
        """Read the options from a kernel's arguments by their names."""
        scale, bias, sinks = (_first(named, names) for names in (_SCALE, _BIAS, _SINKS))
        return KernelOptions(
            scale=float(scale) if isinstance(scale, (int, float)) and scale else None,
            causal=_causal(named),
            bias=bias if isinstance(bias, Tensor) else None,
            window=_window(named),
            softcap=float(named.get("softcap") or 0.0),
            alibi=named.get("alibi_slopes"),
            sinks=sinks if isinstance(sinks, Tensor) else None,
            lengths=_lengths(named),
            not_read=next((words for name, words in _NOT_READ.items() if named.get(name) is not None), ""),
        )


def _first(named: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((named[name] for name in names if named.get(name) is not None), None)


@fetched_once
def _host_lengths(cumulative: Tensor) -> list[int]:
    lengths: list[int] = cumulative.diff().tolist()
    return lengths


def _lengths(named: Mapping[str, Any]) -> tuple[Sequence[int], Sequence[int]] | None:
    for of_queries, of_keys in _LENGTHS:
        if isinstance(q := named.get(of_queries), Tensor):
            k = named.get(of_keys)
            return _host_lengths(q), _host_lengths(k if isinstance(k, Tensor) else q)
    return None


def _causal(named: Mapping[str, Any]) -> bool | None:
    if isinstance(kind := named.get("custom_mask_type"), int):  # 1 and 2: causal from the first, or the last key
        return kind > 0
    given = [named[name] for name in _CAUSAL if isinstance(named.get(name), bool)]
    return given[0] if given else None


def _window(named: Mapping[str, Any]) -> tuple[int, int]:
    both = named.get("window_size")
    if isinstance(both, (tuple, list)) and len(both) == 2:
        sides = [*both]
    elif isinstance(both, int) and both > 0:  # that many keys up to the query's own
        sides = [both - 1, 0]
    else:
        sides = [_first(named, (f"window_size_{side}", f"window_{side}")) for side in ("left", "right")]
    left, right = (-1 if side is None or side < 0 else int(side) for side in sides)
    return left, right


def possible_qkv(operation: Operation, options: KernelOptions) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield (dimension of length 3, (q, k, v)) of separate (-1) or packed tensors, with four dimensions each.

    Sequences that are packed into one, (T, H, D), are unpacked to (B, N, H, D).
    """
    named, written = operation.named, operation.written
    read = [a for name, a in named.items() if isinstance(a, Tensor) and name not in written]
    tensors = read if len(read) >= 3 else [a for a in named.values() if isinstance(a, Tensor)]
    found = next(([named[n] for n in names] for names in _QKV if all(named.get(n) is not None for n in names)), None)
    separate = tuple(found or tensors[:3])
    dims = 4 if options.lengths is None else 3
    if options.lengths is not None:
        separate = tuple(t[0] if t.ndim == 4 and len(t) == 1 else t for t in separate)
    if _are_qkv(separate, dims):
        yield -1, _unpacked(separate, options)
    elif tensors and tensors[0].ndim == dims + 1 and tensors[0].is_floating_point():
        packed = tensors[0]
        for dim in (d for d in range(dims) if packed.shape[d] == 3):
            yield dim, _unpacked(packed.unbind(dim), options)


def _are_qkv(tensors: tuple[Any, ...], dims: int) -> bool:
    if len(tensors) < 3 or any(not isinstance(t, Tensor) or t.ndim != dims for t in tensors):
        return False
    q, k, v = tensors
    if not all(t.is_floating_point() for t in tensors) or q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1]:
        return False
    return dims == 3 or q.shape[0] == k.shape[0]


def _unpacked(qkv: tuple[Tensor, ...], options: KernelOptions) -> tuple[Tensor, ...]:
    """View (T, …) tokens of sequences of one length as (B, N, …); sequences of several lengths as one sequence."""
    if options.lengths is None:
        return qkv
    of_queries, of_keys = options.lengths
    count = 1 if several_lengths(options) else len(of_queries)
    used = (sum(of_queries), sum(of_keys), sum(of_keys))
    return tuple(t[:n].unflatten(0, (count, -1)) for t, n in zip(qkv, used, strict=True))


def several_lengths(options: KernelOptions) -> str:
    """Return why packed sequences have no rows of one length; "" if they have, or are not packed."""
    for lengths in options.lengths or ():
        if min(lengths) != max(lengths):
            return (
                f"it runs on packed sequences of {min(lengths)} to {max(lengths)} tokens, and has no rows of one length"
            )
    return ""
