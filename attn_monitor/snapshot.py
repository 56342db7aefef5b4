"""`Snapshot`: attention, metrics and health flags of one step, as plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.measurements import HEALTH_TAG, HealthFlag, Metrics, Verdict

Same = TypeVar("Same", bound="Snapshot")


@dataclass(frozen=True)
class Snapshot:
    """Hold attention of every role and layer on the probe at one step, as `AttentionSnapshot` describes it."""

    step: int
    epoch: int
    names: tuple[str, ...]
    layers: Mapping[tuple[str, int], LayerAttention]
    metrics: Metrics = field(default_factory=Metrics)
    flags: tuple[HealthFlag, ...] = ()
    flags_raised: int = 0
    verdict: Verdict | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """Return roles in the order of capture, such as ("student", "teacher")."""
        return tuple(dict.fromkeys(role for role, _ in self.layers))

    def layers_of(self, role: str) -> tuple[int, ...]:
        """Return the indices of a role's captured layers, in order."""
        return tuple(layer for r, layer in self.layers if r == role)

    def drawn_layers(self, every: bool = False) -> tuple[int, ...]:
        """Return the layers that pictures show: the last captured layer, or with ``every`` all of them."""
        captured = self.layers_of(self.roles[-1])
        return captured if every else captured[-1:]

    def layer(self, role: str, layer: int = -1) -> LayerAttention:
        """Return one layer's attention; a negative layer counts from the last captured one.

        Raises:
            KeyError: The role or the layer is not in this snapshot.
        """
        captured = self.layers_of(role)
        if not captured:
            raise KeyError(f"role {role!r} is not in this snapshot; it holds {', '.join(self.roles)}")
        if layer < 0 and -layer <= len(captured):
            layer = captured[layer]
        if layer not in captured:
            raise KeyError(f"layer {layer} of {role!r} is not in this snapshot; it holds {list(captured)}")
        return self.layers[role, layer]

    def rows(self, role: str, layer: int = -1) -> Tensor:
        """Return a layer's rows, (B, H, T) float32: prefix tokens first, then patches row by row."""
        return self.layer(role, layer).rows

    def maps(self, role: str, layer: int = -1) -> Tensor:
        """Return the patch part of `rows` as images, (B, H, *grid) float32."""
        return self.layer(role, layer).maps

    def scalars(self, *, heads: bool | Collection[int] = True) -> dict[str, float]:
        """Return values for loggers by tag: means ``attn/…``, ``attn/health_flags`` and heads ``attn_heads/…``.

        Args:
            heads: whether to include single heads, or the layers to include the heads of.
        """
        layers = heads if isinstance(heads, Collection) else {key.layer for key in self.metrics} if heads else ()
        values = {key.tag: value for key, value in self.metrics.items() if key.head is None or key.layer in layers}
        return {**values, HEALTH_TAG: float(self.flags_raised)}

    def only(self, layers: Sequence[int]) -> Snapshot:
        """Return a snapshot with only the rows and patches of some layers, as film strips need, without metrics."""
        kept = {
            key: replace(value.rows_alone(), patches=value.patches)
            for key, value in self.layers.items()
            if key[1] in layers
        }
        return Snapshot(self.step, self.epoch, self.names, kept)

    def in_plane(self: Same, only: int | None = None) -> Same:
        """Return the snapshot with layers of two axes, as `LayerAttention.in_plane` makes them."""
        return replace(self, layers={key: value.in_plane(only) for key, value in self.layers.items()})

    def with_colors(self: Same, other: Snapshot) -> Same:
        """Return this snapshot with the patch colours of the same snapshot, in place of the tokens, and its metrics."""
        layers = {
            key: replace(value, patches=None, patch_colors=other.layers[key].patch_colors)
            if value.patches is not None and key in other.layers
            else value
            for key, value in self.layers.items()
        }
        return replace(self, layers=layers, metrics=Metrics({**self.metrics, **other.metrics}))
