"""`DrawingOptions`: colours, heads and sizes in pictures."""

from __future__ import annotations

from dataclasses import dataclass

from attn_monitor.draw.colormap import COLORMAPS
from attn_monitor.draw.scales import SCALES
from attn_monitor.errors import ArgumentError
from attn_monitor.measure.metrics import check_threshold


@dataclass(frozen=True)
class DrawingOptions:
    """Options of all pictures.

    Args:
        threshold: Share of attention that an outlined mask holds, above 0 and up to 1.
        scale: Colour scale: "uniform" is fixed, so that steps can be compared; "minmax" stretches each map.
        heads: Heads that are drawn beside their mean; None for all.
        cell: Approximate side of a map in pixels; None makes few maps large and many small.
        colormap: Colour table, "inferno" or "viridis".

    Raises:
        ArgumentError: A value is unknown or out of its range.

    Example:
        >>> DrawingOptions(heads=(0, 3), scale="minmax").threshold
        0.6
        >>> DrawingOptions(threshold=60)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        attn_monitor.errors.ArgumentError: threshold=60: expected a share of attention mass above 0 ...
    """

    threshold: float = 0.6
    scale: str = "uniform"
    heads: tuple[int, ...] | None = None
    cell: int | None = None
    colormap: str = "inferno"

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.scale not in SCALES:
            expected = " or ".join(f'"{name}" ({scale.description})' for name, scale in SCALES.items())
            raise ArgumentError(f"scale={self.scale!r}: expected {expected}")
        if self.colormap not in COLORMAPS:
            raise ArgumentError(f"colormap={self.colormap!r}: expected one of {', '.join(COLORMAPS)}")
