"""Memory of an all-layers capture next to a plain forward, and to the full matrices that it does without."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measure import peak_bytes
from benchmarks.peers import Size, no_grad, recorder, timm_vit


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes, over what there was before the call."""

    tokens: int
    plain: int
    ours: int
    verified: int
    matrices: int  # what the full matrices of all layers would take

    @property
    def extra(self) -> float:
        """What the capture adds, as a share of the plain forward's peak."""
        return self.ours / self.plain - 1

    @property
    def saving(self) -> float:
        """How many times more the full matrices would take than the capture adds."""
        return self.matrices / max(self.ours - self.plain, 1)


def measure_memory(size: Size) -> Memory:
    """Peaks of one model, run plainly and captured."""
    model, images = timm_vit(size), size.images()
    record = recorder(model, images, "all")
    for _ in range(9):  # places are checked after 1, 2, 4, 8 and 16 recordings, with several images at once
        record()
    return Memory(
        tokens=size.tokens,
        plain=peak_bytes(no_grad(model, images)),
        ours=peak_bytes(recorder(model, images, "all")),
        verified=peak_bytes(recorder(model, images, "all", True)),
        matrices=size.depth * size.matrix_bytes,
    )
