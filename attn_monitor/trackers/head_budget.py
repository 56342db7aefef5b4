"""Limit the metrics of single heads for loggers that advise a limit, as there may be thousands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from attn_monitor.snapshot import Snapshot


def layers_within(snapshot: Snapshot, budget: int) -> tuple[int, ...]:
    """Return as many of the last layers as have at most ``budget`` metrics of single heads; at least one."""
    costs = head_keys(snapshot)
    kept: list[int] = []
    for layer in sorted(costs, reverse=True):
        if kept and sum(costs[k] for k in kept) + costs[layer] > budget:
            break
        kept.append(layer)
    return tuple(sorted(kept))


def head_keys(snapshot: Snapshot) -> Counter[int]:
    """Count each layer's metrics of single heads, including drift, which the first snapshot lacks."""
    costs = Counter(
        key.layer
        for key in snapshot.metrics
        if key.head is not None and key.layer is not None and key.metric != "drift"
    )
    for (_, layer), attention in snapshot.layers.items():
        costs[layer] += attention.rows.shape[1]
    return costs


def budget_text(label: str, kept: Sequence[int], snapshot: Snapshot) -> str:
    """Describe which curves a logger does not get, why, and where they are."""
    costs = head_keys(snapshot)
    return (
        f"{label} gets the curves of single heads of {len(kept)} of the {len(costs)} watched layers, {kept[0]} to "
        f"{kept[-1]}: all would be {sum(costs.values()):,} metrics, and W&B advises fewer than 10,000 in a project. "
        "Every layer is in the means, the heat maps attn_overview/heads_… and the archive"
    )
