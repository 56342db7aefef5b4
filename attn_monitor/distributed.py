"""Several processes watch one probe: each runs its share, all agree on how that went, and all get the whole.

Everything here except `is_on`, `is_rank_zero` and `share` is collective: all processes call it, in the same order.
"""

from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from attn_monitor import errors
from attn_monitor.attention import KINDS, OPTIONAL_TENSORS, PATCH_TENSORS, LayerAttention
from attn_monitor.errors import text_of

Result = TypeVar("Result")
Captured = dict[tuple[str, int], LayerAttention]


def is_on() -> bool:
    """Whether there is a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank_zero() -> bool:
    """Whether this process is the first of its group, or the only one."""
    return not is_on() or dist.get_rank() == 0


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class RankZero:
    """The process that acts and decides for all; ``broadcast`` gives every process what rank zero has.

    By default there is one process, which is rank zero itself.
    """

    broadcast: Callable[[Any], Any] = _unchanged
    rank: int = 0

    @property
    def is_here(self) -> bool:
        """Whether this process is it."""
        return self.rank == 0

    def run(self, action: Callable[[], Result]) -> Result:
        """What the action returns or raises on rank zero, in every process."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_here:
            try:
                outcome = action(), None
            except Exception as error:
                outcome = None, _portable(error)
        result: Result
        result, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return result


@dataclass(frozen=True)
class Share:
    """Which images of a probe of ``count`` this process runs: equally many in each process.

    Sharded models take part in every forward of one another, so a process beyond the last image runs an image again
    that belongs to another; ``own`` leaves those out.
    """

    count: int
    indices: tuple[int, ...]
    own: tuple[int, ...]


def share(count: int) -> Share:
    """This process's part of ``count`` images."""
    each = math.ceil(count / dist.get_world_size())
    places = range(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    return Share(count, tuple(i % count for i in places), tuple(i for i in places if i < count))


def is_out_of_memory(error: BaseException | None) -> bool:
    """CUDA's own error, the CPU allocator's, or one that was caused by them."""
    if error is None:
        return False
    cpu = isinstance(error, (RuntimeError, MemoryError)) and "DefaultCPUAllocator" in text_of(error)
    return cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_out_of_memory(error.__cause__)


def agree(action: Callable[[], Result]) -> Result:
    """Do it in every process; where it fails in one, all raise, so that none waits for another in vain.

    All raise the same type, naming the first process that failed: out of memory only if nothing worse happened.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    reports: list[tuple[str, str, bool] | None] = [None] * dist.get_world_size()
    mine = None if error is None else (type(error).__name__, text_of(error), is_out_of_memory(error))
    dist.all_gather_object(reports, mine)
    failed = [(memory, rank, kind, text) for rank, (kind, text, memory) in _present(reports)]
    if failed:
        memory, rank, kind, text = min(failed)
        cause = error if rank == dist.get_rank() else None  # another cause here must not change what is done next
        raise _same_type(kind, f"{text} (process {rank} of {len(reports)})", memory) from cause
    return result


def largest(value: int) -> int:
    """The largest number that any process has."""
    values = [0] * dist.get_world_size()
    dist.all_gather_object(values, int(value))
    return max(values)


def _present(reports: list[tuple[str, str, bool] | None]) -> list[tuple[int, tuple[str, str, bool]]]:
    return [(rank, report) for rank, report in enumerate(reports) if report is not None]


def _same_type(kind: str, text: str, memory: bool) -> Exception:
    """An exception that every process can make: the refusal itself, out of memory, or what it was in words."""
    if memory:
        return torch.OutOfMemoryError(text)
    refusal = getattr(errors, kind, None)
    return refusal(text) if refusal is not None else RuntimeError(f"{kind}: {text}")


def merge(mine: Captured, part: Share) -> Captured:
    """Every process's images in their places, on the device they are on: sums with zeros, which are exact.

    Four reductions, whose size does not depend on the number of processes. What one process does not know of a layer is
    not known of the whole. Raises `UnsupportedAttentionError` in all processes when they do not hold the same layers.
    """
    device = next(iter(mine.values())).rows.device
    _check_same_layers(mine, device)
    mine = _known_to_all(mine, device)
    tensors = [(key, name, value) for key, attention in mine.items() for name, value in attention.tensors.items()]
    spread = [_spread(value, part) for _, _, value in tensors]
    flat = torch.cat([s.to(spread[0].device).flatten() for s in spread])
    dist.all_reduce(flat)
    whole: dict[tuple[str, int], dict[str, Any]] = {key: {} for key in mine}
    pieces = flat.split([s.numel() for s in spread])
    for (key, name, value), empty, piece in zip(tensors, spread, pieces, strict=True):
        whole[key][name] = piece.view_as(empty).to(value)
    for key, verdict in _verdicts(mine, flat.device).items():
        whole[key].update(verdict)
    return {key: replace(attention, **whole[key]) for key, attention in mine.items()}


def _portable(error: Exception) -> Exception:
    """The error itself if other processes can be sent it, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickle raises whatever the error's own constructor does
        return RuntimeError(f"{type(error).__name__}: {text_of(error)}")
    return error


def _spread(values: Tensor, part: Share) -> Tensor:
    """(share, …) to (count, …): zero wherever another process has the image."""
    whole = values.new_zeros(part.count, *values.shape[1:])
    whole[list(part.own)] = values[: len(part.own)]
    return whole


def _check_same_layers(mine: Captured, device: torch.device) -> None:
    layout = [(key, a.name, a.num_prefix, a.grid, len(a.rows), a.rows.shape[1:]) for key, a in mine.items()]
    digest = zlib.crc32(repr(layout).encode())
    extremes = torch.tensor([digest, -digest], device=device)  # the largest and the smallest of all processes
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, smallest = extremes.tolist()
    if largest != -smallest:
        raise errors.UnsupportedAttentionError(
            f"the {dist.get_world_size()} processes captured different layers, so that their rows cannot be put "
            "together. Watch the same model in every process, or leave out distributed=True"
        )


def _known_to_all(mine: Captured, device: torch.device) -> Captured:
    """With those optional tensors alone that every process has, as one may have refused some of its numbers."""
    names = (*OPTIONAL_TENSORS, *PATCH_TENSORS)
    known = torch.tensor([[float(name in a.tensors) for name in names] for a in mine.values()], device=device)
    dist.all_reduce(known, dist.ReduceOp.MIN)
    kept = [{"rows", *(n for n, k in zip(names, row, strict=True) if k)} for row in known.tolist()]
    return {
        key: a.with_tensors({name: t for name, t in a.tensors.items() if name in shared})
        for (key, a), shared in zip(mine.items(), kept, strict=True)
    }


def _verdicts(mine: Captured, device: torch.device) -> Mapping[tuple[str, int], dict[str, Any]]:
    """The largest error that any process found at each layer (NaN: one did not check), and the least regular rows."""
    found = [
        [math.inf if math.isnan(a.verified_error) else a.verified_error, float(a.mixed), float(KINDS.index(a.kind))]
        for a in mine.values()
    ]
    worst = torch.tensor(found, dtype=torch.float32, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {
        key: {
            "verified_error": math.nan if error == math.inf else error,
            "mixed": mixed == 1,
            "kind": KINDS[int(kind)],
        }
        for key, (error, mixed, kind) in zip(mine, worst.tolist(), strict=True)
    }
