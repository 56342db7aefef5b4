"""A budget of metrics for loggers that advise one: curves of single heads are what there are thousands of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from attn_monitor.snapshot import Snapshot


def layers_within(snapshot: Snapshot, budget: int) -> tuple[int, ...]:
    """From the last layer back, those whose heads' curves together are at most ``budget`` metrics; one at least."""
    costs = head_keys(snapshot)
    kept: list[int] = []
    for layer in sorted(costs, reverse=True):
        if kept and sum(costs[k] for k in kept) + costs[layer] > budget:
            break
        kept.append(layer)
    return tuple(sorted(kept))


def head_keys(snapshot: Snapshot) -> Counter[int]:
    """How many metrics of single heads each layer has in a run, with drift, which the first snapshot lacks."""
    costs = Counter(key.layer for key in snapshot.metrics if key.head is not None and key.metric != "drift")
    for (_, layer), attention in snapshot.layers.items():
        costs[layer] += attention.rows.shape[1]
    return costs


def budget_text(label: str, kept: Sequence[int], snapshot: Snapshot) -> str:
    """What is left out, why, and where it is."""
    costs = head_keys(snapshot)
    return (
        f"{label} gets the curves of single heads of {len(kept)} of the {len(costs)} watched layers, {kept[0]} to "
        f"{kept[-1]}: all would be {sum(costs.values()):,} metrics, and W&B advises fewer than 10,000 in a project. "
        "Every layer is in the means, the heat maps attn_overview/heads_… and the archive"
    )
