"""`PatchColors`: a layer's patch tokens as colours, computed when they are first asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class PatchColors:
    """Colours of patches, (B, N, 3) float32 in 0…1 on the host, in steps of 1/255; black where a token held NaN.

    ``make`` computes them and their scale (see `measure.patch_features`) on the thread that asks first, and is called
    once: a decomposition that takes longer than a GPU's forward belongs where pictures are drawn, not into training.
    """

    def __init__(self, make: Callable[[], tuple[Tensor, float]]) -> None:
        self._make: Callable[[], tuple[Tensor, float]] | None = make
        self._made: tuple[Tensor, float] | None = None
        self._lock = threading.RLock()  # a signal's handler may save a checkpoint, which asks again

    @classmethod
    def of(cls, rgb: Tensor, scale: float) -> PatchColors:
        """Colours that are there already."""
        colors = cls(lambda: (rgb, scale))
        colors.settle()
        return colors

    def settle(self) -> tuple[Tensor, float]:
        """The colours and their scale; what they are computed from is let go."""
        with self._lock:
            if self._made is None:
                assert self._make is not None
                self._made = self._make()
                self._make = None
            return self._made

    def give_up(self, rgb: Tensor) -> None:
        """These instead, black ones, if they could not be computed: what looks at them would fail again and again."""
        with self._lock:
            self._made, self._make = self._made or (rgb, 1.0), None

    @property
    def rgb(self) -> Tensor:
        """(B, N, 3)."""
        return self.settle()[0]

    @property
    def scale(self) -> float:
        """The distance from grey, along a channel, of a colour that is full: in units of a token's length."""
        return self.settle()[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return PatchColors.of, self.settle()
