"""Compute a layer's mean attention distance while its attention matrix can still be read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.capture.observe.attention_rows import Chunk
from attn_monitor.capture.sites import ReadableSite
from attn_monitor.grid import Grid


def has_query_of_each_patch(site: ReadableSite) -> bool:
    """Return whether every patch is a query too, without which the distance is undefined."""
    return len(site.places.patch_queries) == math.prod(site.layout.grid)


class MeanDistance:
    """Accumulate the mean attention distance of all patch queries from chunks of rows.

    Args:
        site: A site for which `has_query_of_each_patch` holds.
        image_size: Number of pixels on each axis.
        axes: Names of the axes.
        device: The device of the rows.
    """

    def __init__(
        self, site: ReadableSite, image_size: Sequence[int], axes: Sequence[str], device: torch.device
    ) -> None:
        grid = site.layout.grid
        self._apart = not Grid(grid, axes=axes).has_one_unit
        middles = Grid(grid, site.layout.geometry).centres(image_size)  # pixels
        lines = zip(middles, Grid(grid).lines, strict=True)
        places = [torch.tensor(axis, dtype=torch.float32, device="cpu")[line] for axis, line in lines]
        self._centres = torch.stack(places, -1).to(device)  # (N, axes) pixels
        self._patches = torch.tensor(site.layout.patches, device=device)
        self._patch_of_query = {query: patch for patch, query in site.places.patch_queries.items()}
        self._total = torch.zeros((), device=device)

    def add(self, chunk: Chunk) -> None:
        """Add the rows of the patch queries in this chunk; rows of prefix tokens are ignored."""
        found = [(i, self._patch_of_query[q]) for i, q in enumerate(chunk.queries) if q in self._patch_of_query]
        if not found:
            return
        index, patches = (torch.tensor(one, device=self._centres.device) for one in zip(*found, strict=True))
        p = chunk.rows[:, :, index][..., self._patches]  # (B, H, queries, N)
        places = self._centres.split(1, -1) if self._apart else [self._centres]
        found_on = [F.attention_distance(p, place[patches], place).sum(-1) for place in places]
        self._total = self._total + (torch.stack(found_on, -1) if self._apart else found_on[0])

    @property
    def value(self) -> Tensor:
        """Return the mean distance, (B, H), in pixels; (B, H, axes), along each axis, where axes have several units."""
        return self._total / len(self._patches)
