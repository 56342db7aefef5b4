"""Make the table of attention sinks at the end of a run: where attention collects, since when, and to what effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from attn_monitor.attention import LayerAttention
from attn_monitor.measure.metrics import SINK_SHARES
from attn_monitor.measure.sinks import LEAST_SHARE, find_sinks, register_verdict
from attn_monitor.measurements import MetricKey
from attn_monitor.record.curves import Curves
from attn_monitor.snapshot import Snapshot
from attn_monitor.workers import safe_point

COLUMNS = (
    *("role", "layer", "queries", "token", "tokens"),
    *("attention %", "× uniform", "V / median", "since step", "verdict"),
)


class AttentionSinkRow(NamedTuple):
    """Hold one attention sink, or a remark about a layer; fields without a value are None or empty."""

    role: str
    layer: int
    queries: str
    token: str = ""
    tokens: float | None = None
    attention: float | None = None  # percent
    times_uniform: float | None = None
    value: float | None = None
    since: int | None = None  # step from which on the layer has had sinks
    verdict: str = "no sink"


def sink_rows(snapshot: Snapshot, curves: Curves) -> list[AttentionSinkRow]:
    """Return the rows of all layers of a snapshot with measured sinks."""
    measured = {key[:2] for key in snapshot.metrics if key.metric in SINK_SHARES}
    return [
        row
        for (role, layer), attention in snapshot.layers.items()
        if (role, layer) in measured
        for row in _of_layer(role, attention, curves)
    ]


def _of_layer(role: str, attention: LayerAttention, curves: Curves) -> Iterator[AttentionSinkRow]:
    safe_point()
    queries, sinks = find_sinks(attention)
    empty = AttentionSinkRow(role, attention.layer, queries)
    if sinks is None:
        yield empty._replace(verdict="not known, as attention holds NaN or infinity")
        return
    since = _since(curves, role, attention.layer)
    for sink in sinks:
        values = sink.token, sink.tokens, 100 * sink.share, sink.times_uniform, sink.value, since, sink.verdict
        yield AttentionSinkRow(role, attention.layer, queries, *values)
    if not sinks:
        yield empty
    if verdict := register_verdict(sinks, attention):
        yield empty._replace(token="registers", verdict=verdict)


def _since(curves: Curves, role: str, layer: int) -> int | None:
    """Return the step from which on a layer has had sinks until the end of the run, None if it has none now."""
    since = None
    for key, points in curves.of(SINK_SHARES).items():
        if key == MetricKey(role, layer, key.metric):
            for step, share in points:
                since = (step if since is None else since) if share >= LEAST_SHARE else None
    return since


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table as Markdown."""
    lines = [columns, ["---"] * len(columns), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
