"""What a layer's queries say together, while its attention can still be read: their largest logits."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.capture.observation import ReadObservation

EveryQueryOf = Literal["none", "last", "all"]
"""Of which wanted layers every query is read: one layer costs about one percent of a forward."""


def check_every_query(every_query: str) -> EveryQueryOf:
    """The layers of which every query is read, if it is one of the choices."""
    if every_query not in get_args(EveryQueryOf):
        raise ValueError(f'every_query={every_query!r}: expected "none", "last" (wanted layer) or "all"')
    return every_query  # type: ignore[return-value]


@F.full_precision()
def query_statistics(seen: ReadObservation, cls: int | None, *, whole: bool) -> dict[str, Tensor]:
    """Optional tensors of `LayerAttention`, in float32.

    ``max_logit_cls`` (B, H) where the CLS query stands at ``cls``; ``max_logit`` (B, H) where the ``whole`` matrix is
    to be read. Neither where the scores are not known.
    """
    found: dict[str, Tensor | None] = {}
    if cls is not None:
        found["max_logit_cls"] = seen.source.largest_logit(cls)
    if whole:
        logits = seen.source.every_query().largest_logits
        found["max_logit"] = None if logits is None else logits.amax(-1)
    return {name: value.float() for name, value in found.items() if value is not None}
