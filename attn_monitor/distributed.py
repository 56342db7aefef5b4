"""Record one probe in several processes: each runs a share of the images, and all get the merged result.

All functions except `portable`, `is_distributed`, `is_rank_zero` and `share` are collective: every process calls them
in the same order.
"""

from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from attn_monitor import errors
from attn_monitor.attention import KINDS, OPTIONAL_TENSORS, PATCH_TENSORS, LayerAttention
from attn_monitor.errors import chain_of, text_of

Result = TypeVar("Result")
Captured = dict[tuple[str, int], LayerAttention]


def portable(error: BaseException, otherwise: type[Exception] = RuntimeError) -> Exception:
    """Return the error if it can be pickled and ends no process, else one of another type with its text."""
    with suppress(Exception):  # raised by the constructor of the error
        pickle.loads(pickle.dumps(error))
        if isinstance(error, Exception):
            return error
    return otherwise(f"{type(error).__name__}: {text_of(error)}")


def is_distributed() -> bool:
    """Return True if there is a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank_zero() -> bool:
    """Return True in the first process of the group, or in the only one."""
    return not is_distributed() or dist.get_rank() == 0


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class RankZero:
    """Rank zero, the process that acts and decides for all; by default the only process.

    Args:
        broadcast: Collective function that returns rank zero's value in every process.
        rank: Rank of this process.

    Example:
        >>> RankZero().run(lambda: 3)
        3
    """

    broadcast: Callable[[Any], Any] = _unchanged
    rank: int = 0

    @property
    def is_here(self) -> bool:
        """True in rank zero."""
        return self.rank == 0

    def run(self, action: Callable[[], Result]) -> Result:
        """Run the action in rank zero, and return its result or raise its error in every process."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_here:
            try:
                outcome = action(), None
            except Exception as error:
                outcome = None, portable(error)
        result: Result
        result, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return result


@dataclass(frozen=True)
class Share:
    """The images that this process runs, equally many in each process.

    All processes of a sharded model take part in every forward, so a process beyond the last image repeats one of
    another process.

    Args:
        count: Number of images of the probe.
        indices: Images to run.
        own: Images to run, without repeated ones.
    """

    count: int
    indices: tuple[int, ...]
    own: tuple[int, ...]


def share(count: int) -> Share:
    """Return this process's share of ``count`` images."""
    each = math.ceil(count / dist.get_world_size())
    places = range(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    return Share(count, tuple(i % count for i in places), tuple(i for i in places if i < count))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return True for CUDA's out-of-memory error, the CPU allocator's, or an error caused by one."""
    return any(
        isinstance(each, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(each, RuntimeError) and "DefaultCPUAllocator" in text_of(each))
        for each in chain_of(error)
    )


def run_in_all(action: Callable[[], Result]) -> Result:
    """Run the action in every process; if one fails, raise in all, so that none waits for another.

    All raise the same type, with the rank of the first process that failed. Out of memory has the lowest priority.
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
        cause = error if rank == dist.get_rank() else None  # another cause would be handled differently here
        raise _same_type(kind, f"{text} (process {rank} of {len(reports)})", memory) from cause
    return result


def max_over_processes(value: int) -> int:
    """Return the maximum of the processes' values."""
    values = [0] * dist.get_world_size()
    dist.all_gather_object(values, int(value))
    return max(values)


def _present(reports: list[tuple[str, str, bool] | None]) -> list[tuple[int, tuple[str, str, bool]]]:
    return [(rank, report) for rank, report in enumerate(reports) if report is not None]


def _same_type(kind: str, text: str, memory: bool) -> Exception:
    """Make an exception of this package's type, of out of memory, or a RuntimeError that names another type."""
    if memory:
        return torch.OutOfMemoryError(text)
    refusal = getattr(errors, kind, None)
    return refusal(text) if refusal is not None else RuntimeError(f"{kind}: {text}")


def merge(mine: Captured, part: Share) -> Captured:
    """Merge the processes' images, on their device, by summing tensors that are zero elsewhere, which is exact.

    It takes four reductions, the size of which does not depend on the number of processes.

    Args:
        mine: Attention of this process's images by (role, layer).
        part: Share of this process.

    Returns:
        Attention of all images, without optional tensors that a process does not have.

    Raises:
        UnsupportedAttentionError: The processes do not hold the same layers; raised in all of them.
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


def _spread(values: Tensor, part: Share) -> Tensor:
    """Spread values (share, ...) to (count, ...), zero at images of other processes."""
    whole = values.new_zeros(part.count, *values.shape[1:])
    whole[list(part.own)] = values[: len(part.own)]
    return whole


def _check_same_layers(mine: Captured, device: torch.device) -> None:
    layout = [(key, a.name, a.num_prefix, a.grid, len(a.rows), a.rows.shape[1:]) for key, a in mine.items()]
    digest = zlib.crc32(repr(layout).encode())
    extremes = torch.tensor([digest, -digest], device=device)  # maximum and minimum over processes
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, smallest = extremes.tolist()
    if largest != -smallest:
        raise errors.UnsupportedAttentionError(
            f"the {dist.get_world_size()} processes captured different layers, so that their rows cannot be merged. "
            "Watch the same model in every process, or leave out distributed=True"
        )


def _known_to_all(mine: Captured, device: torch.device) -> Captured:
    """Drop the optional tensors that some process does not have, as it may have refused them."""
    names = (*OPTIONAL_TENSORS, *PATCH_TENSORS)
    known = torch.tensor([[float(name in a.tensors) for name in names] for a in mine.values()], device=device)
    dist.all_reduce(known, dist.ReduceOp.MIN)
    kept = [{"rows", *(n for n, k in zip(names, row, strict=True) if k)} for row in known.tolist()]
    return {
        key: a.with_tensors({name: t for name, t in a.tensors.items() if name in shared})
        for (key, a), shared in zip(mine.items(), kept, strict=True)
    }


def _verdicts(mine: Captured, device: torch.device) -> Mapping[tuple[str, int], dict[str, Any]]:
    """Merge checks: the largest error of each layer, NaN if a process did not check, and the least regular kind."""
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
