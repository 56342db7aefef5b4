"""Snapshots as the page reads them: facts in plain values, and for each layer a block of numbers.

A block holds one layer of all roles at one step: float16 numbers, all low bytes before all high bytes, which deflates
to a quarter less, then colours as single bytes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.measurements import HealthFlag
from attn_monitor.snapshot import Snapshot
from attn_monitor.workers import safe_point

Layout = list[dict[str, Any]]


@dataclass(frozen=True)
class PatchRows:
    """Attention of some patches of a layer: their indices, ascending, and their rows (B, H, len(patches), T)."""

    patches: list[int]
    rows: Tensor


OfPatches = Mapping[tuple[str, int], PatchRows]
"""By role and layer."""


def layout_of(snapshot: Snapshot, *, features: bool = True, of_patches: OfPatches = MappingProxyType({})) -> Layout:
    """The snapshot's layers, in the order of their numbers in blocks; other arguments as in `block`.

    ``prefix`` has the names of the tokens before the patches. ``geometry`` gives the position of patches in pixels of
    the image, None where they tile it. ``features`` is the number of features of a patch.
    """
    return [
        {
            "role": role,
            "layer": layer,
            "name": a.name,
            "model": a.model,
            "query": a.query,
            "places": a.places,
            "kind": a.kind,
            "mixed": a.mixed,
            "prefix": list(a.prefix_names or (f"token {i}" for i in range(a.num_prefix))),
            "grid": list(a.grid),
            "axes": list(a.grid.axes),
            "geometry": None if a.geometry is None else asdict(a.geometry),
            "heads": a.rows.shape[1],
            "colors": _optional(a, "colors") is not None,
            "features": _width(a) if features else 0,
            "queries": of_patches[role, layer].patches if (role, layer) in of_patches else [],
        }
        for (role, layer), a in snapshot.layers.items()
    ]


def block(
    snapshot: Snapshot, layer: int, *, features: bool = True, of_patches: OfPatches = MappingProxyType({})
) -> bytes:
    """Deflated rows (B, H, T) of the layer in every role, then features (B, N, K), then rows of patches (B, H, Q, T).

    At the end there are colours (B, N, 3) of 0…255.
    """
    safe_point()
    parts = [a for (_, index), a in snapshot.layers.items() if index == layer]
    numbers = [a.rows for a in parts]
    numbers += [f for a in parts if features and (f := _optional(a, "features")) is not None]
    numbers += [of_patches[key].rows for key in snapshot.layers if key[1] == layer and key in of_patches]
    colours = [c for a in parts if (c := _optional(a, "colors")) is not None]
    halves = np.concatenate([n.half().numpy().astype("<f2").ravel() for n in numbers]).view(np.uint8).reshape(-1, 2)
    bytes_of_colours = [(c.clamp(0, 1).nan_to_num() * 255).round().byte().numpy().tobytes() for c in colours]
    return zlib.compress(np.ascontiguousarray(halves.T).tobytes() + b"".join(bytes_of_colours), 6)


def blocks(
    snapshot: Snapshot, *, features: bool = True, of_patches: OfPatches = MappingProxyType({})
) -> dict[int, bytes]:
    """The `block` of each layer."""
    layers = dict.fromkeys(layer for _, layer in snapshot.layers)
    return {layer: block(snapshot, layer, features=features, of_patches=of_patches) for layer in layers}


def has_features(snapshot: Snapshot) -> bool:
    """Whether any layer has features of its patches."""
    return any(_width(a) > 0 for a in snapshot.layers.values())


def measured(snapshot: Snapshot) -> dict[str, Any]:
    """Metrics by "role/layer/metric": the mean, then the values of heads where there are any; None for NaN.

    Those of a whole model are "role/model/metric".
    """
    values: dict[str, list[float | None]] = {}
    for key, value in snapshot.metrics.items():
        layer = "model" if key.layer is None else key.layer
        found = values.setdefault(f"{key.role}/{layer}/{key.metric}", [])
        found.insert(0 if key.head is None else len(found), float(f"{value:.5g}") if math.isfinite(value) else None)
    return values


def flag_of(flag: HealthFlag) -> Mapping[str, Any]:
    """A flag in plain values; ``words`` is its message."""
    return {**flag.state_dict(), "words": str(flag)}


def _optional(attention: LayerAttention, name: str) -> Tensor | None:
    found: Tensor | None = getattr(attention, name, None)
    return found


def _width(attention: LayerAttention) -> int:
    features = _optional(attention, "features")
    return 0 if features is None else features.shape[-1]
