"""Weights from a folder of `torch.distributed.checkpoint`, read by its own reader in one process without a group."""

from __future__ import annotations

import io
import math
import pathlib
import pickle
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from attn_monitor.errors import CheckpointError
from attn_monitor.weights.files import SHARDED, Weights, code_error, refuse_packed_records

_PARTS = {
    metadata.__name__: {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    filesystem.__name__: {"_StorageInfo"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}
"""Names by module of all that metadata consists of, beside paths."""


def read_sharded(folder: Path) -> Weights:
    """Read names and shapes from the folder's metadata; ``load`` puts the pieces of tensors together.

    Raises:
        CheckpointError: the metadata names anything else than parts of metadata, or leads out of the folder; from
            ``load``, pieces are missing, of another size, or hold code.
    """
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise CheckpointError(
            f"a folder of torch.distributed.checkpoint, which is read from PyTorch 2.6 on (here {torch.__version__}). "
            "Update PyTorch, or convert it by torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    with (folder / SHARDED).open("rb") as file:
        found = _MetadataUnpickler(file).load()
    if not isinstance(found, Metadata):
        raise CheckpointError(f"its {SHARDED} holds a {type(found).__name__}, expected a distributed checkpoint's")
    tensors = {n: m for n, m in found.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
    return Weights({n: torch.Size(tensor.size) for n, tensor in tensors.items()}, partial(_load, folder, found))


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what metadata consists of, and nothing else: the reader's own unpickling would run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return getattr(pathlib, f"Pure{name}")
        if name not in _PARTS.get(module, ()):
            raise CheckpointError(f"its {SHARDED} names {module}.{name}, which is no part of metadata; nothing was run")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads pieces that are what `torch.save` writes of a tensor."""

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        file.seek(sinfo.offset)
        piece = io.BytesIO(file.read(sinfo.length))
        refuse_packed_records(piece, len(piece.getbuffer()))
        piece.seek(0)
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(piece):
            raise code_error(names)
        piece.seek(0)
        return piece


def _load(folder: Path, found: Metadata, names: Iterable[str]) -> dict[str, Tensor]:
    wanted = {name: cast(TensorStorageMetadata, found.state_dict_metadata[name]) for name in names}
    files = _files(folder, [place for index, place in found.storage_data.items() if index.fqn in wanted])
    for name, tensor in wanted.items():
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise CheckpointError(f"the pieces of {name} do not add up to its shape {tuple(tensor.size)}")
    needed = sum(math.prod(t.size) * t.properties.dtype.itemsize for t in wanted.values())
    stored = sum(file.stat().st_size for file in files)
    if needed > stored:  # else a few bytes with strides of 0 could fill the memory
        raise CheckpointError(
            f"its {SHARDED} claims {needed:,} bytes of tensors, more than the {stored:,} in its files; copy them again"
        )
    tensors = {name: torch.zeros(t.size, dtype=t.properties.dtype) for name, t in wanted.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, found, is_coordinator=True)
    reader = _Reader(folder)
    reader.set_up_storage_reader(found, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return tensors


def _files(folder: Path, places: Iterable[Any]) -> set[Path]:
    """Return the files in which pieces are stored, all of them in the folder."""
    for place in places:
        if place.transform_descriptors:
            how = ", ".join(place.transform_descriptors)
            raise CheckpointError(f"its pieces are packed ({how}), which is not read here")
        if Path(place.relative_path).name != place.relative_path:
            raise CheckpointError(f"its {SHARDED} leads out of the folder, to {place.relative_path}")
        if not (folder / place.relative_path).is_file():  # nor a pipe, which would be waited for
            raise CheckpointError(f"{place.relative_path} is missing in it")
    return {folder / place.relative_path for place in places}
