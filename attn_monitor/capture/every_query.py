"""Compute statistics over a layer's queries while its attention can still be read: logits, sinks, distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.capture.attention_distance import MeanDistance, has_query_of_each_patch
from attn_monitor.capture.observe.attention_rows import widen
from attn_monitor.capture.observe.observation import ReadObservation
from attn_monitor.capture.recording_options import RecordingOptions
from attn_monitor.capture.recording_plan import SitePlan


class QueryStatistics(NamedTuple):
    """Hold optional fields of `LayerAttention` by name, float32.

    Attributes:
        of_row: QueryStatistics of the recorded row.
        of_many: QueryStatistics over many queries.
        error: Largest relative error of the rows that were read, see `CheckedRows`; None if not compared.
    """

    of_row: dict[str, Tensor]
    of_many: dict[str, Tensor]
    error: Tensor | None


@F.full_precision()
def query_statistics(
    seen: ReadObservation,
    planned: SitePlan,
    query: object,
    options: RecordingOptions,
    whole: bool,
    image_size: Sequence[int],
    axes: Sequence[str],
) -> QueryStatistics:
    """Compute the requested statistics that are defined here, in at most one pass over all rows.

    Args:
        seen: The attention, while it can still be read.
        planned: The site and its token order.
        query: The requested query, such as "cls" or "mean".
        options: Select the statistics.
        whole: Measure logits and sinks over every query too, not only for the recorded row.
        image_size: Number of pixels on each axis.
        axes: Names of the axes.
    """
    of_row: dict[str, Tensor | None] = {}
    of_many: dict[str, Tensor | None] = {}
    if options.logits and query == "cls" and isinstance(planned.query, int):
        of_row["max_logit_cls"] = seen.source.largest_logit(planned.query)
    if options.sinks and query in ("cls", "mean"):
        of_row["value_norms"] = _in_order(_value_norms(seen.values, seen.rows), planned.order)
    counted = planned.site.places.counted
    whole = whole and bool(counted)
    received = whole and options.sinks and query != "mean"
    distance = options.distance and has_query_of_each_patch(planned.site)
    checked = seen.checked_rows
    if distance or received or (whole and options.logits):
        mean = MeanDistance(planned.site, image_size, axes, seen.rows.device) if distance else None
        largest, total = [], torch.zeros((), device=seen.rows.device)
        for chunk in checked.chunks(counted or None, logits=options.logits and whole):
            if mean is not None:
                mean.add(chunk)
            if received:
                total = total + chunk.rows.sum(2)
            if chunk.largest_logits is not None:
                largest.append(chunk.largest_logits.amax(-1))
        of_many["distance"] = None if mean is None else mean.value
        of_many["max_logit"] = torch.stack(largest).amax(0) if largest else None
        if received:
            total = total / len(counted)
            of_many["value_norms"] = _in_order(_value_norms(seen.values, total), planned.order)
            of_many["received"] = _in_order(total.mean(1), planned.order)
    row, many = ({name: t.float() for name, t in found.items() if t is not None} for found in (of_row, of_many))
    return QueryStatistics(row, many, checked.error)


def _in_order(per_key: Tensor, order: Tensor | None) -> Tensor:
    return per_key if order is None else per_key[..., order]


def _value_norms(values: Tensor, weights: Tensor) -> Tensor:
    """Return the norm of each key's V relative to the median key's, (B, K), averaged over heads.

    The average is weighted by each head's attention to the key, ``weights`` (B, H, K), since V reaches the queries in
    that proportion.
    """
    norms = torch.linalg.vector_norm(widen(values), dim=-1)  # (B, H, K), or fewer heads where queries are grouped
    norms = norms.repeat_interleave(weights.shape[1] // norms.shape[1], 1)
    tokens = norms.shape[-1]
    median = norms.sort(-1).values[..., (tokens - 1) // 2, None]  # deterministic CUDA has no `median`
    relative = norms / median.clamp_min(torch.finfo(norms.dtype).tiny)
    weights = weights.abs().clamp_min(torch.finfo(norms.dtype).tiny)
    mean: Tensor = (relative * weights).sum(1) / weights.sum(1)
    return mean
