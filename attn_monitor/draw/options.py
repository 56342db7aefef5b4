"""`DrawingOptions`: colours, heads and sizes in pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attn_monitor.draw.colormap import COLORMAPS
from attn_monitor.draw.scales import SCALES
from attn_monitor.errors import ArgumentError, check_whole
from attn_monitor.measure.threshold import check_threshold

Heads = tuple[int, ...] | int | Literal["all", "mean"]


@dataclass(frozen=True)
class DrawingOptions:
    """Options of all pictures.

    Args:
        threshold: share of attention mass, above 0 and up to 1, that an outlined mask holds. Metrics of masks use it
            too.
        scale: "uniform" (in units of uniform attention, so that steps can be compared) or "minmax" (each map for
            itself, DINO's look).
        heads: "all", "mean" for the mean over heads alone, a head, or a list of heads; the mean is always drawn.
        cell: approximate side of a map in pixels; by default few maps are large and many small.
        colormap: "inferno" or "viridis".
        slice: frame of clips or slice of volumes, counted in patches from 0, that film strips show; by default their
            mean.

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
    scale: Literal["uniform", "minmax"] = "uniform"
    heads: Heads = "all"
    cell: int | None = None
    colormap: Literal["inferno", "viridis"] = "inferno"
    slice: int | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.scale not in [*SCALES]:  # a list, as another type may not be hashable
            expected = " or ".join(f'"{name}" ({scale.description})' for name, scale in SCALES.items())
            raise ArgumentError(f"scale={self.scale!r}: expected {expected}")
        if self.colormap not in [*COLORMAPS]:
            raise ArgumentError(f"colormap={self.colormap!r}: expected one of {', '.join(COLORMAPS)}")
        check_whole("cell", self.cell, 1, "a number of pixels of at least 1, or None")
        check_whole("slice", self.slice, 0, "the number of a frame or slice from 0 on, or None")
        if isinstance(self.heads, list):
            object.__setattr__(self, "heads", tuple(self.heads))
        numbers = self.heads if isinstance(self.heads, tuple) else (self.heads,)
        known = self.heads in ("all", "mean") or all(type(h) is int and h >= 0 for h in numbers)
        if not known or not numbers or len(set(numbers)) < len(numbers):
            given = list(self.heads) if isinstance(self.heads, tuple) else self.heads
            raise ArgumentError(
                f'heads={given!r}: expected "all", "mean", the number of a head, or a list of different numbers from 0 '
                "on"
            )

    @property
    def drawn_heads(self) -> tuple[int, ...] | None:
        """Return the heads to draw beside their mean; None for all."""
        if isinstance(self.heads, str):
            return None if self.heads == "all" else ()
        return (self.heads,) if isinstance(self.heads, int) else self.heads
