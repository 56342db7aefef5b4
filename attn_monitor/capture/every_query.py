"""What a layer's queries say together, while its attention can still be read: largest logits, and where sinks are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.capture.attention_rows import widen
from attn_monitor.capture.observation import ReadObservation
from attn_monitor.capture.recording_plan import SitePlan

EveryQueryOf = Literal["none", "last", "all"]
"""Of which wanted layers every query is read: one layer costs about one percent of a forward."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a layer beside its rows: ``logits``, ``sinks``; of the ``whole`` matrix or the read row alone.

    ``query`` is "cls" or "mean" where the row is that one's.
    """

    logits: bool
    sinks: bool
    whole: bool
    query: object


def check_every_query(every_query: str) -> EveryQueryOf:
    """The layers of which every query is read, if it is one of the choices."""
    if every_query not in get_args(EveryQueryOf):
        raise ValueError(f'every_query={every_query!r}: expected "none", "last" (wanted layer) or "all"')
    return every_query  # type: ignore[return-value]


@F.full_precision()
def query_statistics(seen: ReadObservation, planned: SitePlan, asked: Asked) -> dict[str, Tensor]:
    """Optional tensors of `LayerAttention` in float32, those that are asked for and can be known."""
    cls = int(planned.query) if asked.query == "cls" else None
    needs_matrix = asked.whole and (asked.logits or (asked.sinks and asked.query != "mean"))
    every = seen.source.every_query() if needs_matrix else None
    found: dict[str, Tensor | None] = {}
    if asked.logits:
        found["max_logit_cls"] = None if cls is None else seen.source.largest_logit(cls)
        if every is not None and every.largest_logits is not None:
            found["max_logit"] = every.largest_logits.amax(-1)
    if asked.sinks and (every is not None or asked.query in ("cls", "mean")):
        weights = seen.rows if every is None else every.received
        found["value_norms"] = _in_order(_value_norms(seen.values, weights), planned.order)
        found["received"] = None if every is None else _in_order(weights.mean(1), planned.order)
    return {name: value.float() for name, value in found.items() if value is not None}


def _in_order(per_key: Tensor, order: Tensor | None) -> Tensor:
    return per_key if order is None else per_key[..., order]


def _value_norms(values: Tensor, weights: Tensor) -> Tensor:
    """The norm of each key's V next to the median key's, (B, K): a mean over heads by ``weights`` (B, H, K).

    A head counts by how much of its attention goes to that key, as its V is what reaches the queries.
    """
    norms = torch.linalg.vector_norm(widen(values), dim=-1)  # (B, H, K), or fewer heads where queries are grouped
    norms = norms.repeat_interleave(weights.shape[1] // norms.shape[1], 1)
    tokens = norms.shape[-1]
    median = norms.sort(-1).values[..., (tokens - 1) // 2, None]  # `median` raises on CUDA where runs are to repeat
    relative = norms / median.clamp_min(torch.finfo(norms.dtype).tiny)
    weights = weights.abs().clamp_min(torch.finfo(norms.dtype).tiny)
    mean: Tensor = (relative * weights).sum(1) / weights.sum(1)
    return mean
