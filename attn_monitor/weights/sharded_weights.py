"""Tensors from a folder of torch.distributed.checkpoint, read by one process without a process group."""

from __future__ import annotations

import collections
import io
import math
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from attn_monitor.errors import CheckpointError
from attn_monitor.weights.safe_unpickling import refuse_packed_records, unpickle_data
from attn_monitor.weights.weights import Weights, not_larger_than_stored

METADATA = ".metadata"

_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{
        (module, f"{system}Path"): getattr(pathlib, f"Pure{system}Path")
        for module in ("pathlib", "pathlib._local")
        for system in ("Posix", "Windows")
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what `.metadata` consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = _CLASSES.get((module, name))
        if known is None and module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if known is None:
            raise CheckpointError(
                f"its {METADATA} names {module}.{name}, which is no part of such metadata; nothing was run"
            )
        return known


def read_sharded(folder: Path) -> Weights:
    """Names and shapes from the folder's metadata; a tensor's pieces are read and put together when it is asked for."""
    with (folder / METADATA).open("rb") as file:
        found = _MetadataUnpickler(file).load()
    if not isinstance(found, Metadata):
        raise CheckpointError(f"its {METADATA} holds a {type(found).__name__}, expected a distributed checkpoint's")
    tensors = {n: m for n, m in found.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}

    def read(name: str) -> Tensor:
        return _whole(folder, name, tensors[name], found.storage_data)

    return Weights({name: torch.Size(tensor.size) for name, tensor in tensors.items()}, read)


def _whole(folder: Path, name: str, tensor: TensorStorageMetadata, places: dict[MetadataIndex, Any]) -> Tensor:
    pieces = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in tensor.chunks}
    if sum(map(math.prod, pieces.values())) != math.prod(tensor.size):
        raise CheckpointError(f"the pieces of {name} do not add up to its shape {tuple(tensor.size)}")
    stored = {at: _piece(folder, places[MetadataIndex(name, at)]) for at in pieces}
    for at, piece in stored.items():
        if piece.shape != pieces[at]:
            raise CheckpointError(f"a piece of {name} is {tuple(piece.shape)}, expected {pieces[at]}")
    whole = torch.zeros(tensor.size, dtype=tensor.properties.dtype)
    for at, piece in stored.items():
        inside = tuple(slice(start, start + size) for start, size in zip(at, piece.shape, strict=True))
        whole[inside].copy_(piece)
    return whole


def _piece(folder: Path, place: Any) -> Tensor:
    if place.transform_descriptors:
        how = ", ".join(place.transform_descriptors)
        raise CheckpointError(f"its pieces are packed ({how}), which is not read here")
    if Path(place.relative_path).name != place.relative_path:
        raise CheckpointError(f"its {METADATA} leads out of the folder, to {place.relative_path}")
    if not (folder / place.relative_path).is_file():
        raise CheckpointError(f"{place.relative_path} is missing in it")
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        content = io.BytesIO(file.read(place.length))
    refuse_packed_records(content, len(content.getbuffer()))
    content.seek(0)
    piece, _ = unpickle_data(content, mmap=False)
    if not isinstance(piece, Tensor):
        raise CheckpointError(f"{place.relative_path} holds a {type(piece).__name__}, expected a tensor")
    return not_larger_than_stored(place.relative_path, piece)
