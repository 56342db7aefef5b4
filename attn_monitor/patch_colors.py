"""`PatchColors`: a layer's patch tokens as colours, computed at the first use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class PatchColors:
    """Compute colours of patches once, on the thread that first uses them.

    The colours are (B, N, 3) float32 in 0…1 on the CPU, in steps of 1/255; black where a token held NaN. They need a
    decomposition that takes longer than a forward on a GPU, so it should run where pictures are drawn, not in training.

    Args:
        make: computes the colours and their scale, see `measure.patch_features`.
    """

    def __init__(self, make: Callable[[], tuple[Tensor, float]]) -> None:
        self._make: Callable[[], tuple[Tensor, float]] | None = make
        self._made: tuple[Tensor, float] | None = None
        self._lock = threading.RLock()  # reentrant, as a signal's handler may save a checkpoint

    @classmethod
    def of(cls, rgb: Tensor, scale: float) -> PatchColors:
        """Wrap colours (B, N, 3) that are already computed."""
        colors = cls(lambda: (rgb, scale))
        colors.settle()
        return colors

    def settle(self) -> tuple[Tensor, float]:
        """Return the colours and their scale, and release what they are computed from."""
        with self._lock:
            if self._made is None:
                assert self._make is not None
                self._made = self._make()
                self._make = None
            return self._made

    def give_up(self, rgb: Tensor) -> None:
        """Use the given colours if the computation fails, so that it is not repeated at each use."""
        with self._lock:
            self._made, self._make = self._made or (rgb, 1.0), None

    @property
    def rgb(self) -> Tensor:
        """Return the colours, (B, N, 3)."""
        return self.settle()[0]

    @property
    def scale(self) -> float:
        """Return the distance from grey to a full colour along a channel, in units of a token's length."""
        return self.settle()[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return PatchColors.of, self.settle()
