"""Archives of made-up runs: real snapshots of a small model whose attention sharpens and lets go again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attn_monitor import AttentionMonitor, AttentionSnapshot, ProbeBatch
from attn_monitor.record.archive import snapshot_path
from tests.support.helpers import tiny_vit


def noise_probe(seed: int = 0, size: int = 32) -> ProbeBatch:
    """Two images of noise."""
    return ProbeBatch(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed)))


def write_run(
    folder: Path,
    steps: Sequence[int] = (0, 10, 20, 30),
    *,
    sharpness: Sequence[float] = (0, 6, 6, 0),
    probe: ProbeBatch | None = None,
    model: dict[str, Any] | None = None,
    roles: Sequence[str] = ("student", "teacher"),
    **settings: Any,
) -> list[AttentionSnapshot]:
    """An archive; ``sharpness`` of a step multiplies the scores of the student, half of it those of the teacher."""
    probe = probe or noise_probe()
    monitor = AttentionMonitor(probe, **settings)
    probe.save(folder / "probe.npz")
    models = {role: tiny_vit(**(model or {})) for role in roles}
    weights = [block.attn.qkv.weight for m in models.values() for block in m.blocks]
    before = [torch.randn_like(w) * 0.02 for w in weights]
    snapshots = []
    for step, sharp in zip(steps, sharpness, strict=True):
        with torch.no_grad():
            for i, (weight, start) in enumerate(zip(weights, before, strict=True)):
                weight.copy_(start * (1 + 5 * sharp * (1 if i < len(weights) / 2 else 0.5)))
        snapshots.append(monitor.colored(monitor.snapshot(models, step=step)))
        snapshots[-1].save(snapshot_path(folder, step))
    return snapshots
