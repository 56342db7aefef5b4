"""Whole attention matrices as `.npy` files, streamed: a few queries at a time are in memory, whatever the size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor, nn

from attn_monitor.capture.layer_selection import Layers, QuerySpec
from attn_monitor.capture.observe.observation import ReadObservation
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.sites import ReadableSite
from attn_monitor.commands.support.results import progress
from attn_monitor.record.atomic_file import atomic_file


def save_matrices(
    model: nn.Module,
    images: Tensor,
    folder: str | Path,
    *,
    names: Sequence[str] | None = None,
    layers: Layers = -1,
    query: QuerySpec = "cls",
) -> list[Path]:
    """Write whole attention matrices, `{name}-layer{L}.npy` for each image and layer: (heads, queries, keys) float32.

    Images run one at a time, and memory is linear in the tokens unless the model itself makes the matrix. Every row is
    checked against the model's own output; a file appears only after that. Keys stand as in a `Snapshot`: the prefix
    (CLS, registers) first, then the patches row by row; queries likewise where they are the same tokens, else in the
    model's own order.

    Args:
        model: runs on its device.
        images: (B, C, H, W), normalised.
        folder: an existing folder.
        names: of the images, for the files; by default image0, image1, ….
        layers: index, module path, list of these, or "all".
        query: chooses layers as in `AttentionRecorder`; all queries are written.

    Returns:
        The paths of the files.

    Raises:
        AttentionError: the attention of a layer cannot be read.
    """
    folder = Path(folder)
    paths: list[Path] = []
    names = [f"image{i}" for i in range(len(images))] if names is None else names
    recorder = AttentionRecorder(model, layers=layers, query=query)
    for name, image in progress(list(zip(names, images, strict=True)), "attention matrices"):
        with ExitStack() as files:  # which are renamed once all layers are checked

            def write(site: ReadableSite, seen: ReadObservation) -> Tensor | None:
                paths.append(folder / f"{name}-layer{site.index}.npy")  # noqa: B023 - called within this turn
                return _write(files.enter_context(atomic_file(paths[-1])), site, seen)

            recorder(image[None], on_layer=write)
    return paths


def _write(file: IO[bytes], site: ReadableSite, seen: ReadObservation) -> Tensor | None:
    """Write one image's matrix, row after row; into a plain file, as a full disk kills a process that maps one.

    Returns the largest difference of its rows from the model's own output.
    """
    shape = site.heads, site.queries, site.keys
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    start, row_bytes, keys = file.tell(), 4 * site.keys, list(site.layout.order)
    place = {query: row for row, query in enumerate(_query_order(site))}
    checked = seen.checked_rows
    for queries, chunk, _ in checked.chunks():
        rows = chunk[0][..., keys].float().cpu().numpy().astype("<f4", copy=False)  # (heads, some queries, keys)
        for head, of_head in enumerate(rows):
            for query, row in zip(queries, of_head, strict=True):
                file.seek(start + (head * site.queries + place[query]) * row_bytes)
                file.write(row.tobytes())
    return checked.error


def _query_order(site: ReadableSite) -> Sequence[int]:
    """Return the keys' order where every patch is the query of the same index, else the model's own."""
    same = all(site.places.patch_queries.get(cell) == token for cell, token in enumerate(site.layout.patches))
    return site.layout.order if same and site.queries == site.keys else range(site.queries)
