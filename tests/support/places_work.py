"""What each of two processes does in test_places_in_processes.py; every function returns what its process saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.capture import site_cache
from attn_monitor.capture.site_discovery import discover
from tests.hostile.test_changed_orders import MIRRORED, Ordered, ordered


def looks(model: Ordered, changed: Any) -> dict[str, Any]:
    """Maps and discoveries of six shared snapshots; after the third, something changes."""
    dist.init_process_group("gloo") if not dist.is_initialized() else None
    found, maps = [], []
    images = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    monitor = AttentionMonitor(ProbeBatch(images), distributed=True)

    def discovered(*args: Any) -> Any:
        found.append(len(maps))
        return discover(*args)

    site_cache.discover = discovered  # type: ignore[attr-defined]
    try:
        for step in range(6):
            if step == 3:
                changed(model)
            maps.append(monitor.snapshot({"backbone": model}, step=step).layers["backbone", 1].maps)
    finally:
        site_cache.discover = discover  # type: ignore[attr-defined]
    return {"maps": maps, "found": found, "flags": [flag.kind for flag in monitor.health.flags if flag.kind == "order"]}


def differing(folder: Path) -> dict[str, Any]:
    """An attribute that changes in one process alone, a buffer in both, and a learned order; plain and sharded."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()

    def one_process(model: Ordered) -> None:
        model.note = f"written by {rank}" if rank == 1 else None  # type: ignore[assignment]

    def both(model: Ordered) -> None:
        model.order.copy_(MIRRORED)

    def learned(model: Ordered) -> None:
        with torch.no_grad():
            model.get_parameter("scores").copy_(MIRRORED.argsort().float())

    ways = {"one process": one_process, "both": both, "learned": learned}
    seen = {name: looks(ordered(), change) for name, change in ways.items()}
    sharded = ordered()
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    return {**seen, "sharded": looks(sharded, both)}
