"""`LayerAttention`: what one layer's query token attends to. The value between capture and all that follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attn_monitor.grid import Grid, GridGeometry
from attn_monitor.patch_colors import PatchColors

RowKind = Literal["distribution", "weights", "signed"]
"""Rows that sum to 1; that do not (heads scaled, weights dropped or added); that have negative entries."""

KINDS: tuple[RowKind, ...] = ("distribution", "weights", "signed")
"""From the most regular to the least."""

OPTIONAL_TENSORS = ("norms", "cosine", "distance", "max_logit", "max_logit_cls", "received", "value_norms")
PATCH_TENSORS = ("patches", "features")  # of the tokens that enter the block, one for each patch


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's query token attends to, for every image and head.

    ``rows`` is (B, H, T) float32 on the model's device: the prefix tokens first (CLS, registers and whatever else is no
    patch), then the patches row by row. They are what multiplies V. ``kind`` says what they are: a "distribution" that
    sums to 1 over T, "weights" that do not (heads scaled, keys dropped after the softmax), or "signed" where some are
    negative; ``mixed`` marks layers that do not apply a softmax as it is (talking heads, gated mixes).
    ``verified_error`` is the relative difference between row·V and the model's own output, NaN when it was not checked.
    ``places`` says how it is known which key is which patch: "exact", "exact but masked" or "centres", see
    `capture.token_places`. ``model`` is the name of the model's class, ``query`` the query that was read.
    ``prefix_names`` has a name for each prefix token: "CLS", "register 1" and so on where it was found to be that, else
    "token 27" by its index in the model (padding, text, …); it is empty in archives from before names were kept.

    On demand: ``distance`` is the mean attention distance in pixels, (B, H). ``norms`` (B, T), in the rows' order, are
    those of the tokens that enter the layer's block, and ``cosine`` (B,) is the mean cosine between its CLS token and
    its patches; None where a block's input is not these tokens, or has no CLS token. ``max_logit`` (B, H) is the
    largest of the logits, scale · q·k + bias of the pairs that are not masked, over all keys and the queries that are
    patches or the model's own tokens (not padding); ``max_logit_cls`` that of the CLS query. ``received`` (B, T) is the
    attention on each token, a mean over these queries and the heads; ``value_norms`` (B, T) the norm of its V next to
    the median token's, over heads by their attention.

    Of the tokens that enter the block, those of patches alone: ``colors`` (B, N, 3) in 0…1, whose meaning stays from
    snapshot to snapshot; ``features`` (B, N, K ≤ 32) at unit length, whose products are the tokens' cosines but for
    ``features_error``, its root mean square and its maximum. ``patches`` (B, N, D), the tokens at unit length in
    float16, are there between capture and these two, and not stored.
    """

    layer: int
    name: str
    rows: Tensor
    num_prefix: int
    grid: Grid
    mixed: bool
    verified_error: float
    kind: RowKind = "distribution"
    places: str = ""
    distance: Tensor | None = None
    norms: Tensor | None = None
    cosine: Tensor | None = None
    max_logit: Tensor | None = None
    max_logit_cls: Tensor | None = None
    received: Tensor | None = None
    value_norms: Tensor | None = None
    model: str = ""
    query: str = ""
    prefix_names: tuple[str, ...] = ()
    patches: Tensor | None = None
    features: Tensor | None = None
    features_error: tuple[float, float] | None = None
    patch_colors: PatchColors | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", Grid(self.grid))  # a tuple is a grid whose cells tile the image

    @property
    def geometry(self) -> GridGeometry | None:
        """Where the patches lie in the image's pixels; None where they tile the whole image."""
        return self.grid.geometry

    @property
    def maps(self) -> Tensor:
        """The patch part as images, (B, H, gh, gw), not renormalised: DINO's numbers."""
        return self.grid.unflatten(self.rows[..., self.num_prefix :])

    @property
    def colors(self) -> Tensor | None:
        """Colours of patches, (B, N, 3) float32, computed now if they are not yet; black where a token is NaN."""
        return None if self.patch_colors is None else self.patch_colors.rgb

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What has one entry for each image, by name: ``rows``, and the optional ones that are known."""
        known = {name: getattr(self, name) for name in ("rows", *OPTIONAL_TENSORS, *PATCH_TENSORS)}
        return {name: tensor for name, tensor in known.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LayerAttention:
        """The same layer with other tensors; an optional one that is not among them is None."""
        values: dict[str, Any] = {**dict.fromkeys((*OPTIONAL_TENSORS, *PATCH_TENSORS)), **tensors}
        return replace(self, **values)

    def to(self, device: torch.device | str) -> LayerAttention:
        """The same with all tensors on a device."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def rows_alone(self) -> LayerAttention:
        """The same without the optional tensors."""
        return self.with_tensors({"rows": self.rows})

    @classmethod
    def cat(cls, parts: Sequence[LayerAttention]) -> LayerAttention:
        """One layer's attention on all images, concatenated from its attention on some of them at a time.

        What some of them have not been given is not known of the whole.
        """
        if len(parts) == 1:
            return parts[0]
        names = [name for name in parts[0].tensors if all(name in part.tensors for part in parts)]
        together = {name: torch.cat([part.tensors[name] for part in parts]) for name in names}
        kind = max((part.kind for part in parts), key=KINDS.index)
        # NaN, not checked, is greater than any error.
        error = max((part.verified_error for part in parts), key=lambda error: (math.isnan(error), error))
        mixed = any(part.mixed for part in parts)
        joined = replace(parts[0], kind=kind, mixed=mixed, verified_error=error, patch_colors=None)
        return joined.with_tensors(together)
