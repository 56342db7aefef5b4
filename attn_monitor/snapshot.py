"""`Snapshot`: the attention, metrics and flags of one step, as plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.measurements import HEALTH_TAG, HealthFlag, Metrics


@dataclass(frozen=True)
class Snapshot:
    """Attention of every role and layer on the probe at one step, on the host, with the metrics made from it.

    ``layers`` maps (role, layer) to a `LayerAttention`; ``names`` are the probe images'; ``metrics`` are values by
    `MetricKey` (role, layer, metric, head); ``flags`` are the health flags raised at this step, ``flags_raised`` how
    many the run has raised so far, these included.
    """

    step: int
    epoch: int
    names: tuple[str, ...]
    layers: Mapping[tuple[str, int], LayerAttention]
    metrics: Metrics = field(default_factory=Metrics)
    flags: tuple[HealthFlag, ...] = ()
    flags_raised: int = 0

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles in the order of capture, such as ("student", "teacher")."""
        return tuple(dict.fromkeys(role for role, _ in self.layers))

    def layers_of(self, role: str) -> tuple[int, ...]:
        """Layer indices captured for a role, in order."""
        return tuple(layer for r, layer in self.layers if r == role)

    def drawn_layers(self, every: bool = False) -> tuple[int, ...]:
        """Layers that pictures show: the last one captured, or every one."""
        captured = self.layers_of(self.roles[-1])
        return captured if every else captured[-1:]

    def layer(self, role: str, layer: int = -1) -> LayerAttention:
        """One layer's attention; a negative layer counts from the last one captured.

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
        """(B, H, T) float32: prefix tokens first, then patches row by row; sums to 1 unless the layer is mixed."""
        return self.layer(role, layer).rows

    def maps(self, role: str, layer: int = -1) -> Tensor:
        """(B, H, gh, gw) float32: the patch part of `rows`."""
        return self.layer(role, layer).maps

    def scalars(self, *, heads: bool | Collection[int] = True) -> dict[str, float]:
        """Values for loggers, by tag: ``attn/…`` means, ``attn/health_flags``, and ``attn_heads/…`` of each head.

        ``heads``: whether heads are included, or the layers whose heads are.
        """
        layers = heads if isinstance(heads, Collection) else {key.layer for key in self.metrics} if heads else ()
        values = {key.tag: value for key, value in self.metrics.items() if key.head is None or key.layer in layers}
        return {**values, HEALTH_TAG: float(self.flags_raised)}

    def only(self, layers: Sequence[int]) -> Snapshot:
        """The rows of some layers alone, without metrics: what a film strip needs."""
        kept = {key: value.rows_alone() for key, value in self.layers.items() if key[1] in layers}
        return Snapshot(self.step, self.epoch, self.names, kept)
