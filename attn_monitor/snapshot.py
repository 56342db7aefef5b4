"""`AttentionSnapshot`: what was captured at one step, and its file format.

A file is a plain `.npz`: `header` holds JSON, and each `rows/{role}/{layer}` a (B, H, T) float16 array (`norms`,
`cosine` and `distance` are float32), so that `numpy.load(path, allow_pickle=False)` reads it anywhere.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_monitor.capture import LayerAttention
from attn_monitor.health import HealthFlag

FORMAT = 1
OPTIONAL = ("norms", "cosine", "distance")  # of a `LayerAttention`


class ArchiveError(ValueError):
    """A file is no readable snapshot: truncated, of another version, or something else altogether."""


@dataclass(frozen=True)
class AttentionSnapshot:
    """Attention of every role and layer on the probe at one step, on the host, with the metrics made from it.

    ``layers`` maps (role, layer) to a `LayerAttention`; ``names`` are the probe images'; ``metrics`` is what goes to
    the loggers, by tag; ``flags`` are the health flags raised at this step.
    """

    step: int
    epoch: int
    names: tuple[str, ...]
    layers: Mapping[tuple[str, int], LayerAttention]
    metrics: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[HealthFlag, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles in the order of capture, such as ("student", "teacher")."""
        return tuple(dict.fromkeys(role for role, _ in self.layers))

    def layers_of(self, role: str) -> tuple[int, ...]:
        """Layer indices captured for a role, in order."""
        return tuple(layer for r, layer in self.layers if r == role)

    def layer(self, role: str, layer: int = -1) -> LayerAttention:
        """One layer's attention; a negative layer counts from the last one captured."""
        captured = self.layers_of(role)
        if not captured:
            raise KeyError(f"role {role!r} is not in this snapshot; it holds {', '.join(self.roles)}")
        if layer < 0 and -layer <= len(captured):
            layer = captured[layer]
        if layer not in captured:
            raise KeyError(f"layer {layer} of {role!r} is not in this snapshot; it holds {list(captured)}")
        return self.layers[role, layer]

    def rows(self, role: str, layer: int = -1) -> Tensor:
        """(B, H, T) float32: prefix tokens first, then patches row by row; sums to 1 unless the layer is mixed."""
        return self.layer(role, layer).rows

    def maps(self, role: str, layer: int = -1) -> Tensor:
        """(B, H, gh, gw) float32: the patch part of `rows`."""
        return self.layer(role, layer).maps

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a temporary name and rename, so that a reader never meets half a file."""
        header, arrays = self._stored()
        write_npz(Path(path), header, {k: v.numpy() for k, v in arrays.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionSnapshot:
        """Read a snapshot; `ArchiveError` when the file is not one."""
        header, arrays = read_npz(Path(path))
        try:
            return cls._from_stored(header, {k: torch.from_numpy(v) for k, v in arrays.items()})
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ArchiveError(f"{path}: its header and arrays do not fit together: {error!r}") from error

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: float16 tensors and a JSON text, loadable with ``weights_only=True``."""
        header, arrays = self._stored()
        return {"header": json.dumps(header), "arrays": arrays}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> AttentionSnapshot:
        """The snapshot that `state_dict` came from, in float16 precision."""
        return cls._from_stored(json.loads(state["header"]), state["arrays"])

    def only(self, layers: Sequence[int]) -> AttentionSnapshot:
        """The same without metrics and other layers: what a film strip needs."""
        nothing: dict[str, Any] = dict.fromkeys(OPTIONAL)
        kept = {key: replace(value, **nothing) for key, value in self.layers.items() if key[1] in layers}
        return AttentionSnapshot(self.step, self.epoch, self.names, kept)

    def _stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        header = {
            "format": FORMAT,
            "step": self.step,
            "epoch": self.epoch,
            "names": list(self.names),
            "metrics": {k: _finite(v) for k, v in self.metrics.items()},
            "flags": [flag.state_dict() for flag in self.flags],
            "layers": [
                {
                    "role": role,
                    "layer": layer,
                    "name": a.name,
                    "num_prefix": a.num_prefix,
                    "grid": list(a.grid),
                    "mixed": a.mixed,
                    "kind": a.kind,
                    "places": a.places,
                    "verified_error": _finite(a.verified_error),
                }
                for (role, layer), a in self.layers.items()
            ],
        }
        arrays = {f"rows/{role}/{layer}": a.rows.half() for (role, layer), a in self.layers.items()}
        for name in OPTIONAL:
            optional = {f"{name}/{role}/{layer}": getattr(a, name) for (role, layer), a in self.layers.items()}
            arrays.update({key: value for key, value in optional.items() if value is not None})
        return header, arrays

    @classmethod
    def _from_stored(cls, header: dict[str, Any], arrays: dict[str, Tensor]) -> AttentionSnapshot:
        layers = {}
        for entry in header["layers"]:
            key = (str(entry["role"]), int(entry["layer"]))
            rows = arrays[f"rows/{key[0]}/{key[1]}"].float()
            grid = (int(entry["grid"][0]), int(entry["grid"][1]))
            prefix = int(entry["num_prefix"])
            if rows.ndim != 3 or rows.shape[-1] != prefix + grid[0] * grid[1]:
                raise ValueError(f"rows of {key} have shape {tuple(rows.shape)} for a grid of {grid}")
            error = _number(entry["verified_error"])
            layers[key] = LayerAttention(
                key[1], str(entry["name"]), rows, prefix, grid, bool(entry["mixed"]), error,
                entry.get("kind", "distribution"), str(entry.get("places", "")),
                *(arrays.get(f"{name}/{key[0]}/{key[1]}") for name in ("distance", "norms", "cosine")),
            )  # fmt: skip
        metrics = {str(k): _number(v) for k, v in header["metrics"].items()}
        flags = tuple(HealthFlag.from_state_dict(flag) for flag in header.get("flags", ()))
        return cls(int(header["step"]), int(header["epoch"]), tuple(map(str, header["names"])), layers, metrics, flags)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def write_npz(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """An `.npz` with a JSON header, complete or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_npz(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Header and arrays of a file written by `write_npz`; pickles are never loaded."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            arrays = {name: file[name] for name in file.files if name != "header"}
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, zlib, NumPy's parser and JSON each have their own errors for damaged files
        raise ArchiveError(f"{path} is not a readable attn_monitor file: {error!r}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise ArchiveError(f"{path} has format {found}, expected {FORMAT}: written by another version of attn_monitor")
    return header, arrays


def snapshot_path(folder: Path, step: int) -> Path:
    """File of a step; names sort in the order of steps."""
    return folder / f"step-{step:09d}.npz"


def snapshot_paths(folder: Path) -> list[Path]:
    """Files of an archive folder in order of steps; none where there is no such folder."""
    return sorted(path for path in folder.glob("step-*.npz") if path.stem.removeprefix("step-").isdigit())


def step_of(path: Path) -> int:
    """The step that `snapshot_path` was made from."""
    return int(path.stem.removeprefix("step-"))


def load_snapshots(folder: str | os.PathLike[str]) -> list[AttentionSnapshot]:
    """All snapshots of an archive folder, in order of steps."""
    paths = snapshot_paths(Path(folder))
    if not paths:
        raise FileNotFoundError(f"{folder}: no snapshots (step-*.npz) here; expected the attn_monitor folder of a run")
    return [AttentionSnapshot.load(path) for path in paths]
