"""`DrawingOptions`: how pictures are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from attn_monitor.draw.colormap import COLORMAPS
from attn_monitor.draw.scales import SCALES
from attn_monitor.measure.metrics import check_threshold


@dataclass(frozen=True)
class DrawingOptions:
    """How pictures are drawn.

    ``threshold`` is the share of attention, 0…1, that an outlined mask holds. ``scale`` says which weights get which
    colours: "uniform" (fixed, so that steps can be compared) or "minmax" (each map for itself); ``colormap`` is the
    table of these colours, "inferno" or "viridis". ``heads`` are drawn beside their mean, None for all. ``cell`` is the
    side of a map in pixels, about; None makes few maps large and many small.
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
            raise ValueError(f"scale={self.scale!r}: expected {expected}")
        if self.colormap not in COLORMAPS:
            raise ValueError(f"colormap={self.colormap!r}: expected one of {', '.join(COLORMAPS)}")
