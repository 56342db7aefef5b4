"""`LayerAttention`: what one layer's query token attends to, as a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from attn_monitor.grid import Grid, GridGeometry

Key = TypeVar("Key")
RowKind = Literal["distribution", "weights", "signed"]
"""Rows sum to 1, or do not (heads scaled, weights dropped or added), or have negative entries."""

KINDS: tuple[RowKind, ...] = ("distribution", "weights", "signed")
"""All kinds, from the most regular to the least."""

OPTIONAL_TENSORS = ("norms", "cosine", "distance", "max_logit", "max_logit_cls", "received", "value_norms")
PATCH_TENSORS = ("patches", "features")  # of the tokens that enter the block, patches only


class PatchColors(NamedTuple):
    """Hold colours of a layer's patch tokens, which keep their meaning from snapshot to snapshot.

    Args:
        rgb: (B, N, 3) float32 in 0…1 on the CPU, in steps of 1/255; black where a token held NaN.
        scale: distance from grey to a full colour along a channel, in units of a token's length.
    """

    rgb: Tensor
    scale: float


@dataclass(frozen=True)
class LayerAttention:
    """Hold what one layer's query token attends to, for every image and head.

    Shapes: B images, H heads, T tokens in the order of ``rows``, N patches on a grid of (gh, gw), or of as many axes as
    the images have, D channels. Optional tensors are None if they were not requested or do not exist. A notebook shows
    a layer as a sheet of its maps.

    Args:
        layer: index in order of execution.
        name: module path.
        rows: (B, H, T) float32 on the model's device, what multiplies V: prefix tokens first (CLS, registers and all
            others that are no patch), then patches row by row, the last axis of the grid fastest.
        num_prefix: number of prefix tokens.
        grid: (gh, gw) of the patches, or (t, gh, gw), …, with the names of its axes, and the patches' geometry if they
            do not tile the image.
        mixed: whether the layer does not apply a plain softmax (talking heads, gated mixes).
        verified_error: relative difference between row·V and the model's own output; NaN if it was not checked.
        kind: "distribution" if rows sum to 1 over T, "weights" if they do not (heads scaled, keys dropped after the
            softmax), "signed" if some entries are negative.
        places: how the patch of each key was found: "exact", "exact but masked" or "centres", see
            `capture.token_places`.
        distance: (B, H), mean attention distance in pixels. Where axes have several units, (B, H, axes): along each
            axis, in its frames, slices, samples, channels or pixels.
        norms: (B, T), norms of the tokens that enter the layer's block.
        cosine: (B,), mean cosine between the CLS token and the patches that enter the block.
        max_logit: (B, H), largest logit, scale · q·k + bias, of pairs that are not masked, over all keys and the
            queries that are no padding.
        max_logit_cls: (B, H), largest logit of the CLS query.
        received: (B, T), attention on each token, averaged over heads and the same queries.
        value_norms: (B, T), norm of each token's V relative to the median token's, averaged over heads by attention.
        model: name of the model's class.
        query: the query that was read.
        prefix_names: a name for each prefix token: "CLS", "register 1", …, else "token 27" by its index in the model
            (padding, text, …); empty in old archives.
        patches: (B, N, D) float16, the patch tokens that enter the block at unit length; not stored.
        features: (B, N, K ≤ 32), the same reduced; their products approximate the tokens' cosines.
        features_error: root mean square and maximum of the error of these products.
        patch_colors: colours of ``patches``, which `AttentionMonitor.colored` adds.

    Example:
        >>> rows = torch.full((1, 2, 5), 0.2)  # 1 image, 2 heads, CLS and 4 patches
        >>> layer = LayerAttention(0, "blocks.0.attn", rows, 1, Grid((2, 2)), mixed=False, verified_error=0.0)
        >>> layer.maps.shape
        torch.Size([1, 2, 2, 2])
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

    def __repr__(self) -> str:
        rows, grid = (" x ".join(map(str, shape)) for shape in (self.rows.shape, self.grid))
        about = f"layer={self.layer}, name={self.name!r}, rows={rows}, grid={grid}, num_prefix={self.num_prefix}"
        return f"LayerAttention({about}, query={self.query!r}, verified_error={self.verified_error:.1e})"

    def _repr_png_(self) -> bytes:
        from attn_monitor.draw.notebook import layer_sheet, png_of  # here, as values know nothing of pictures

        return png_of(layer_sheet(self))

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", Grid(self.grid))  # a plain tuple is a grid that tiles the image

    @property
    def geometry(self) -> GridGeometry | None:
        """Return where the patches lie in the image's pixels; None if they tile the whole image."""
        return self.grid.geometry

    @property
    def maps(self) -> Tensor:
        """Return the patch part of ``rows`` as images, (B, H, *grid), not renormalised, as DINO's maps."""
        return self.grid.unflatten(self.on_patches)

    @property
    def on_patches(self) -> Tensor:
        """Return the patch part of ``rows``, (B, H, N)."""
        return self.rows[..., self.num_prefix :]

    def in_plane(self, only: int | None = None) -> LayerAttention:
        """Return a layer of two axes for pictures: attention summed over frames or slices, or of one row of samples.

        Tokens and features are left out, and colours are averaged.

        Args:
            only: The frame or slice to take, the last one where there are fewer, in units of all of them; None for all.
        """
        more = len(self.grid) - 2
        if more == 0:
            return self
        geometry, axes = self.geometry, self.grid.axes
        flat = Grid((1, *self.grid)[-2:], axes=("", *axes)[-2:])
        if geometry is not None and more > 0:
            flat = Grid(flat, GridGeometry(geometry.origin[-2:], geometry.cell[-2:], geometry.margin[-2:]))

        def summed(x: Tensor) -> Tensor:
            prefix, patches = x[..., : self.num_prefix], self.grid.unflatten(x[..., self.num_prefix :])
            planes = patches.flatten(-len(self.grid), -3)
            depth = planes.shape[-3]
            plane = planes.sum(-3) if only is None else planes.select(-3, min(only, depth - 1)) * depth
            return torch.cat([prefix, plane.flatten(-2)], -1)

        left_out = (*PATCH_TENSORS, "norms", "value_norms")
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in left_out}
        tensors |= {k: summed(tensors[k]) for k in ("rows", "received") if k in tensors and more > 0}
        colors = self.patch_colors
        if colors is not None and more > 0:
            rgb = colors.rgb.unflatten(1, tuple(self.grid)).flatten(1, more).mean(1).flatten(1, 2)
            colors = PatchColors((rgb * 255).round() / 255, colors.scale)
        return replace(self.with_tensors(tensors), grid=flat, patch_colors=colors)

    @property
    def colors(self) -> Tensor | None:
        """Return colours of patches, (B, N, 3) float32 in 0…1, black where a token is NaN; None if there are none."""
        return None if self.patch_colors is None else self.patch_colors.rgb

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return ``rows`` and the optional tensors that are not None, by name."""
        known = {name: getattr(self, name) for name in ("rows", *OPTIONAL_TENSORS, *PATCH_TENSORS)}
        return {name: tensor for name, tensor in known.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LayerAttention:
        """Return a copy with other tensors; an optional one that is missing becomes None."""
        values: dict[str, Any] = {**dict.fromkeys((*OPTIONAL_TENSORS, *PATCH_TENSORS)), **tensors}
        return replace(self, **values)

    def to(self, device: torch.device | str) -> LayerAttention:
        """Return a copy with all tensors on a device."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def rows_alone(self) -> LayerAttention:
        """Return a copy without the optional tensors."""
        return self.with_tensors({"rows": self.rows})

    @classmethod
    def cat(cls, parts: Sequence[LayerAttention]) -> LayerAttention:
        """Concatenate one layer's attention on several sets of images.

        A tensor that some parts lack is None in the result; ``verified_error`` is the largest, or NaN if one is.
        """
        if len(parts) == 1:
            return parts[0]
        names = [name for name in parts[0].tensors if all(name in part.tensors for part in parts)]
        together = {name: torch.cat([part.tensors[name] for part in parts]) for name in names}
        kind = max((part.kind for part in parts), key=KINDS.index)
        # NaN (not checked) counts as the largest error.
        error = max((part.verified_error for part in parts), key=lambda error: (math.isnan(error), error))
        mixed = any(part.mixed for part in parts)
        joined = replace(parts[0], kind=kind, mixed=mixed, verified_error=error, patch_colors=None)
        return joined.with_tensors(together)


def on_host(layers: Mapping[Key, LayerAttention]) -> dict[Key, LayerAttention]:
    """Return the layers with their tensors on the host, copied in one transfer from each device."""
    tensors = {(key, name): tensor for key, layer in layers.items() for name, tensor in layer.tensors.items()}
    for device in {tensor.device for tensor in tensors.values()} - {torch.device("cpu")}:
        there = {key: tensor for key, tensor in tensors.items() if tensor.device == device}
        tensors |= dict(zip(there, unpacked(packed([*there.values()]).cpu(), [*there.values()]), strict=True))
    return {
        key: layer.with_tensors({name: tensors[key, name] for name in layer.tensors}) for key, layer in layers.items()
    }


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Join the bytes of tensors, (n,) uint8."""
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])


def unpacked(data: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Take tensors of the types and shapes of others from their joined bytes, each in memory of its own."""
    parts = data.split([tensor.nbytes for tensor in like])
    return [part.clone().view(one.dtype).view(one.shape) for part, one in zip(parts, like, strict=True)]
