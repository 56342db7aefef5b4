"""Geometry, metrics, flags and verdicts as fields of a file's header: each written, and read with checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attn_monitor.attention import LayerAttention
from attn_monitor.errors import ArchiveError
from attn_monitor.grid import GridGeometry
from attn_monitor.measurements import STATES, HealthFlag, MetricKey, Metrics, Verdict, finite_or_none
from attn_monitor.record.header_fields import Fields


def geometry_fields(geometry: GridGeometry | None) -> dict[str, Any]:
    """Return the header's field for the geometry, none if patches tile the image."""
    if geometry is None:
        return {}
    margin = {"margin": list(geometry.margin)} if any(geometry.margin) else {}
    return {"geometry": {"origin": list(geometry.origin), "cell": list(geometry.cell), **margin}}


def read_geometry(entry: Fields, axes: int) -> GridGeometry | None:
    """Read the geometry of `geometry_fields`."""
    if "geometry" not in entry:
        return None
    stored = entry.child("geometry")
    origin, cell = stored.numbers("origin"), stored.numbers("cell")
    margin = stored.numbers("margin") if "margin" in stored else ()
    if not len(origin) == len(cell) == axes or min(cell) <= 0 or len(margin) not in (0, axes):
        raise ArchiveError(
            f"origin={origin}, cell={cell} in the {stored.where}, expected {axes} numbers each, and cells above 0"
        )
    return GridGeometry(origin, cell, margin)


def metric_fields(metrics: Metrics) -> dict[str, dict[str, Any]]:
    """Return one layer's metrics by name: the mean and, if heads have values, these from head 0 on."""
    stored: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        if key.head is None:
            stored.setdefault(key.metric, {})["mean"] = finite_or_none(value)
        else:
            stored.setdefault(key.metric, {}).setdefault("heads", []).append(finite_or_none(value))
    return stored


def read_metrics(entry: Fields, role: str, layer: int | None) -> Metrics:
    """Read the metrics of `metric_fields`."""
    metrics, stored = Metrics(), entry.child("metrics")
    for name in stored:
        values = stored.child(name)
        metrics[MetricKey(role, layer, name)] = values.number("mean")
        if "heads" in values:
            heads = values.numbers("heads", missing=True)
            if len(heads) != entry.integer("heads"):
                raise ArchiveError(
                    f"{name} in the {stored.where} has {len(heads)} values for {entry.integer('heads')} heads"
                )
            metrics.update({MetricKey(role, layer, name, head): value for head, value in enumerate(heads)})
    return metrics


def read_flag(stored: Fields, layers: Mapping[tuple[str, int], LayerAttention]) -> HealthFlag:
    """Read a flag about one of these layers, or about a whole model if its layer is null."""
    role, heads = stored.text("role"), stored.integers("heads")
    layer = None if stored.is_none("layer") else stored.integer("layer")
    there = layers[role, layer].rows.shape[1] if layer is not None and (role, layer) in layers else 0
    if layer is not None and (there == 0 or any(head >= there for head in heads)):
        raise ArchiveError(f"the {stored.where} is about layer {layer} of {role!r}, heads {heads}, which are not here")
    value = stored.number("value")
    known = None if math.isnan(value) else value
    return HealthFlag(stored.text("kind"), role, layer, heads, stored.integer("step"), known, stored.text("text"))


def read_verdict(stored: Fields) -> Verdict:
    """Read what `Verdict.as_dict` returned."""
    state = next((s for s in STATES if s == stored.text("state")), None)
    if state is None:
        raise ArchiveError(f"state={stored.text('state')!r} in the {stored.where}, expected one of {', '.join(STATES)}")
    evidence = stored.items("evidence")
    if not all(isinstance(text, str) for text in evidence):
        raise ArchiveError(f"evidence={evidence!r} in the {stored.where}, expected strings")
    since = None if stored.is_none("since") else stored.integer("since")
    return Verdict(state, since, tuple(evidence), stored.text("advice"))
