"""Where a layer's patches lie in the image's pixels, as the header of a snapshot holds it."""

from __future__ import annotations

from typing import Any

from attn_monitor.errors import ArchiveError
from attn_monitor.grid_geometry import GridGeometry
from attn_monitor.record.header_fields import Fields


def geometry_facts(geometry: GridGeometry | None) -> dict[str, Any]:
    """Fields of a layer's entry: none where its patches tile the image, as in files that do not know of geometries."""
    return {} if geometry is None else {"geometry": {"origin": list(geometry.origin), "cell": list(geometry.cell)}}


def read_geometry(entry: Fields) -> GridGeometry | None:
    """What `geometry_facts` stored."""
    if "geometry" not in entry:
        return None
    stored = entry.within("geometry")
    origin, cell = stored.numbers("origin"), stored.numbers("cell")
    if not len(origin) == len(cell) == 2 or min(cell) <= 0:
        raise ArchiveError(
            f"origin={origin}, cell={cell} in the {stored.where}, expected two numbers each, and cells above 0"
        )
    return GridGeometry(origin, cell)
