"""The file format of a snapshot, and the same as a state for checkpoints.

A file is a plain `.npz`: `header` holds JSON, and each `rows/{role}/{layer}` a (B, H, T) float16 array; `colors` are
uint8, `features` float16 and all other optional tensors float32. `numpy.load(path, allow_pickle=False)` reads it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from attn_monitor.attention import KINDS, OPTIONAL_TENSORS, LayerAttention, PatchColors
from attn_monitor.errors import ArchiveError
from attn_monitor.grid import Grid
from attn_monitor.measurements import Metrics, finite_or_none
from attn_monitor.record.header_fields import Fields
from attn_monitor.record.npz import Shape, TensorReader, header_text, open_npz, parse_header, tensor_reader, write_npz
from attn_monitor.record.stored_values import (
    geometry_fields,
    metric_fields,
    read_flag,
    read_geometry,
    read_metrics,
    read_verdict,
)
from attn_monitor.snapshot import Snapshot

PRECISION = 1e-2  # of sums over a row, which is stored in float16 and may be a softmax in bfloat16


def write_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot to an `.npz` file, atomically."""
    header, arrays = _stored(snapshot)
    write_npz(path, header, {name: array.numpy() for name, array in arrays.items()})


def stored_bytes(snapshot: Snapshot) -> int:
    """Return how many bytes `write_snapshot` writes, about; patch tokens become colours first."""
    header, arrays = _stored(snapshot)
    colors = sum(3 * a.patches.shape[:2].numel() for a in snapshot.layers.values() if a.patches is not None)
    return len(header_text(header)) + colors + sum(array.nbytes for array in arrays.values())


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot.

    Raises:
        ArchiveError: The file is not a snapshot, or is inconsistent.
    """
    with open_npz(path) as file:
        return _from_stored(file.header, file.tensor)


def snapshot_state(snapshot: Snapshot, *, patches: bool = False) -> dict[str, Any]:
    """Return a snapshot as float16 tensors and JSON, loadable with ``weights_only=True``.

    Args:
        snapshot: the snapshot.
        patches: whether to keep patch tokens that have no colours yet.
    """
    header, arrays = _stored(snapshot)
    for (role, layer), a in snapshot.layers.items() if patches else ():
        if a.patches is not None:
            arrays[f"patches/{role}/{layer}"] = a.patches
    return {"header": header_text(header), "arrays": arrays}


def snapshot_from_state(state: dict[str, Any]) -> Snapshot:
    """Restore a snapshot from `snapshot_state`, in float16 precision.

    Raises:
        ArchiveError: The state is not that of a snapshot, or is inconsistent.
    """
    stored = Fields(state, "state of a snapshot")
    return _from_stored(parse_header(stored.text("header")), tensor_reader(stored.mapping("arrays")))


def _stored(snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a snapshot as the header's fields and arrays by name, in the precision of the file."""
    arrays = {f"rows/{role}/{layer}": a.rows.half() for (role, layer), a in snapshot.layers.items()}
    metrics = snapshot.metrics.by_layer()
    header = {
        "step": snapshot.step,
        "epoch": snapshot.epoch,
        "names": list(snapshot.names),
        "flags": [flag.state_dict() for flag in snapshot.flags],
        "flags_raised": snapshot.flags_raised,
        "verdict": None if snapshot.verdict is None else snapshot.verdict.as_dict(),
        "models": [
            {"role": role, "metrics": metric_fields(values)}
            for (role, layer), values in metrics.items()
            if layer is None
        ],
        "layers": [
            {
                "role": role,
                "layer": layer,
                "name": a.name,
                "num_prefix": a.num_prefix,
                "grid": list(a.grid),
                "axes": list(a.grid.axes),
                "mixed": a.mixed,
                "kind": a.kind,
                "places": a.places,
                "model": a.model,
                "query": a.query,
                "prefix_names": list(a.prefix_names),
                "verified_error": finite_or_none(a.verified_error),
                "heads": a.rows.shape[1],
                "metrics": metric_fields(metrics.get((role, layer), Metrics())),
                **_row_facts(arrays[f"rows/{role}/{layer}"].float(), a.kind),
                **_patch_facts(a),
                **geometry_fields(a.geometry),
            }
            for (role, layer), a in snapshot.layers.items()
        ],
    }
    for name in OPTIONAL_TENSORS:
        optional = {f"{name}/{role}/{layer}": getattr(a, name) for (role, layer), a in snapshot.layers.items()}
        arrays.update({key: value.float() for key, value in optional.items() if value is not None})
    for (role, layer), a in snapshot.layers.items():
        if a.colors is not None:
            arrays[f"colors/{role}/{layer}"] = (a.colors * 255).round().byte()
        if a.features is not None:
            arrays[f"features/{role}/{layer}"] = a.features.half()
    return header, arrays


def _from_stored(header: Fields, read: TensorReader) -> Snapshot:
    """Make a snapshot of the header's fields and of arrays, each checked, and all for consistency."""
    names, metrics = header.names("names"), Metrics()
    layers: dict[tuple[str, int], LayerAttention] = {}
    for number, item in enumerate(header.items("layers")):
        entry = Fields(item, f"header's entry {number} of layers")
        key = entry.text("role"), entry.integer("layer")
        if key in layers:
            raise ArchiveError(f"layer {key[1]} of {key[0]!r} is stored twice")
        of_layer = read_metrics(entry, *key)
        layers[key] = _layer(entry, len(names), of_layer, read)
        metrics.update(of_layer)
    for number, item in enumerate(header.items("models") if "models" in header else ()):
        entry = Fields(item, f"header's entry {number} of models")
        metrics.update(read_metrics(entry, entry.text("role"), None))
    if not layers:
        raise ArchiveError("the header has no layers: expected at least one")
    flags = tuple(
        read_flag(Fields(item, f"header's flag {number}"), layers) for number, item in enumerate(header.items("flags"))
    )
    return Snapshot(
        header.integer("step"),
        header.integer("epoch"),
        names,
        layers,
        metrics,
        flags,
        header.integer("flags_raised"),
        None if "verdict" not in header or header.is_none("verdict") else read_verdict(header.child("verdict")),
    )


def _layer(entry: Fields, images: int, metrics: Metrics, read: TensorReader) -> LayerAttention:
    """Read one layer, checked for consistency with its metrics."""
    role, index, prefix = entry.text("role"), entry.integer("layer"), entry.integer("num_prefix")
    sizes = entry.integers("grid", least=1)
    axes = entry.names("axes") if "axes" in entry else None
    if not 1 <= len(sizes) <= 3 or len(axes or sizes) != len(sizes):
        raise ArchiveError(f"grid={sizes}, axes={axes} of layer {index} of {role!r}, expected one to three of each")
    grid = Grid(sizes, read_geometry(entry, len(sizes)), axes)
    heads = entry.integer("heads", least=1)
    shapes: dict[str, Shape] = {
        "rows": (images, heads, prefix + grid.cells),
        "distance": (images, heads) if grid.has_one_unit else (images, heads, len(grid)),
        "norms": (images, prefix + grid.cells),
        "cosine": (images,),
        "max_logit": (images, heads),
        "max_logit_cls": (images, heads),
        "received": (images, prefix + grid.cells),
        "value_norms": (images, prefix + grid.cells),
    }
    rows = read(f"rows/{role}/{index}", ("float16",), shapes["rows"])
    if rows is None:
        raise ArchiveError(f"rows of layer {index} of {role!r} are missing")
    rows = rows.float()
    optional: dict[str, Any] = {n: read(f"{n}/{role}/{index}", ("float32",), shapes[n]) for n in OPTIONAL_TENSORS}
    name, mixed, error = entry.text("name"), entry.boolean("mixed"), entry.number("verified_error")
    kind = next((k for k in KINDS if k == entry.text("kind")), None)
    if kind is None:
        expected = ", ".join(KINDS)
        raise ArchiveError(f"kind of layer {index} of {role!r} is {entry.text('kind')!r}, expected one of {expected}")
    optional.update({key: entry.text(key) for key in ("places", "model", "query")})
    optional["prefix_names"] = entry.names("prefix_names") if entry.items("prefix_names") else ()
    optional.update(_patches(entry, (images, grid.cells), read))
    attention = LayerAttention(index, name, rows, prefix, grid, mixed, error, kind, **optional)
    _check_rows(entry, attention, metrics)
    if len(attention.prefix_names) not in (0, prefix):
        raise ArchiveError(f"prefix_names of layer {index} of {role!r}: expected {prefix} of them or none")
    return attention


def _patches(entry: Fields, shape: tuple[int, int], read: TensorReader) -> dict[str, Any]:
    """Read the colours and features of one layer's patch tokens; ``shape`` is (images, patches)."""
    role, index, found = entry.text("role"), entry.integer("layer"), dict[str, Any]()
    colors = read(f"colors/{role}/{index}", ("uint8",), (*shape, 3)) if "color_scale" in entry else None
    if colors is not None:
        scale = entry.number("color_scale")
        if not scale > 0:
            raise ArchiveError(f"color_scale of layer {index} of {role!r} is {scale}, expected a number above 0")
        found["patch_colors"] = PatchColors(colors.float() / 255, scale)
    found["patches"] = read(f"patches/{role}/{index}", ("float16",), (*shape, None))
    features = read(f"features/{role}/{index}", ("float16",), (*shape, None)) if "features_error" in entry else None
    if features is not None:
        error = entry.numbers("features_error", missing=True)
        if len(error) != 2:
            raise ArchiveError(f"features_error of layer {index} of {role!r} is {error}, expected two numbers")
        found.update(features=features.float(), features_error=error)
    return found


def _patch_facts(attention: LayerAttention) -> dict[str, Any]:
    """Return the header's fields for colours and features of patch tokens."""
    facts: dict[str, Any] = {}
    if attention.patch_colors is not None:
        facts["color_scale"] = attention.patch_colors.scale
    if attention.features is not None and attention.features_error is not None:
        facts["features_error"] = list(map(finite_or_none, attention.features_error))
    return facts


def _check_rows(entry: Fields, attention: LayerAttention, metrics: Metrics) -> None:
    """Raise `ArchiveError` for rows that contradict the header or the metrics."""
    where = f"rows of layer {attention.layer} of {entry.text('role')!r}"
    facts = _row_facts(attention.rows, attention.kind)
    of_layer = metrics.of_layer(entry.text("role"), attention.layer)
    if entry.boolean("finite") and not facts["finite"]:
        raise ArchiveError(f"{where} hold NaN or infinity, and the header does not say so")
    if entry.boolean("distribution") and not facts["distribution"]:
        raise ArchiveError(f"{where} are not distributions: expected shares of at least 0 that sum to 1")
    found, measured = attention.rows[..., : attention.num_prefix].sum(-1).mean(), of_layer.get("prefix_mass", math.nan)
    if attention.kind == "distribution" and abs(measured - found) > PRECISION:
        raise ArchiveError(f"{where}: num_prefix={attention.num_prefix} does not fit prefix_mass={measured:.3g}")


def _row_facts(rows: Tensor, kind: str) -> dict[str, bool]:
    """Return the header's fields that describe the rows, to detect rows of another file."""
    finite = rows.isfinite().all(-1)
    shares = (rows.amin(-1) >= 0) & ((rows.sum(-1) - 1).abs() <= PRECISION)
    return {"finite": bool(finite.all()), "distribution": kind == "distribution" and bool((shares | ~finite).all())}
