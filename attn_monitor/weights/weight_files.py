"""Tensors by name from files and folders of weights: PyTorch's, safetensors, sharded; pickled code is never run."""

from __future__ import annotations

import stat
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.errors import CheckpointError
from attn_monitor.weights.safe_unpickling import refuse_packed_records, unpickle_data
from attn_monitor.weights.sharded_weights import METADATA, read_sharded
from attn_monitor.weights.weights import Weights


def read_weights(path: Path, *, trust: bool = False) -> Weights:
    """What a file of `torch.save` or of safetensors holds, a folder of the latter, or one of distributed checkpoints.

    Entries of nested dictionaries are named by their path, joined by dots. With ``trust``, files of `torch.save` are
    unpickled like any pickle: their author may run what they want. Raises `CheckpointError`.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path}: does not exist; expected a file or a folder of weights")
    with _damage_as_checkpoint_error(path):
        weights = _read_any(path, trust)

    def read(name: str) -> Tensor:
        with _damage_as_checkpoint_error(path):
            return weights.read(name)

    return replace(weights, read=read)


def read_pickled(path: Path, *, trust: bool = False) -> tuple[Any, list[str]]:
    """What `torch.save` was given, and the classes of objects in it that were left out; raises `CheckpointError`."""
    with _damage_as_checkpoint_error(path):
        return _unpickle(path, trust)


def _read_any(path: Path, trust: bool) -> Weights:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _read_folder(path)
    if not stat.S_ISREG(mode):  # a pipe would be waited for
        raise CheckpointError("not a file")
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise CheckpointError("the file is empty")
    if start[8:] == b"{":  # after the length of its JSON header
        return _read_safetensors([path])
    if start[:2] != b"PK" and start[:1] != b"\x80":  # zip and pickle
        raise CheckpointError("no readable file of weights: neither of torch.save nor of safetensors")
    return _read_torch(path, trust)


@contextmanager
def _damage_as_checkpoint_error(path: Path) -> Iterator[None]:
    """Every error in reading names the file; that it does not exist is an `OSError`, which does so too."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    except Exception as error:  # zip, pickle, torch and safetensors each have their own errors for damaged files
        reason = f"{type(error).__name__}: {first_line(error).partition('. ')[0]}"  # without torch's advice to trust it
        raise CheckpointError(
            f"checkpoint {path}: no readable file of weights, or damaged ({reason}); copy it again, or give another"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says first, without a full stop; what the system says without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_folder(path: Path) -> Weights:
    if (path / METADATA).is_file():
        return read_sharded(path)
    if files := sorted(file for file in path.glob("*.safetensors") if file.is_file()):
        return _read_safetensors(files)
    raise CheckpointError(
        f"a folder without {METADATA} of torch.distributed.checkpoint and without .safetensors files; give a file"
    )


def _read_safetensors(paths: list[Path]) -> Weights:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(f"a file of safetensors: {error}. Run: pip install safetensors") from error

    files: list[Any] = [safe_open(path, framework="pt") for path in paths]
    holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no dictionary
    shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name, file in holder.items()}
    return Weights(shapes, lambda name: holder[name].get_tensor(name))


def _read_torch(path: Path, trust: bool) -> Weights:
    stored, classes = _unpickle(path, trust)
    tensors = dict(_tensors(stored))
    if not tensors and classes:
        raise CheckpointError(
            f"no weights outside of the objects in it, of {', '.join(classes)}, which are code to PyTorch. "
            "Save the model's state_dict(), or pass --trust if you know who wrote the file"
        )
    return Weights.of(tensors, tuple(classes), stored)


def _unpickle(path: Path, trust: bool) -> tuple[Any, list[str]]:
    packed = zipfile.is_zipfile(path)
    if packed:
        with path.open("rb") as file:
            refuse_packed_records(file, path.stat().st_size)
    if trust:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=packed), []
    return unpickle_data(path, mmap=packed)


def _tensors(stored: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dictionaries and modules by path; each dictionary counts once, however often it is held."""
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque([("", stored)])
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, Tensor):
            yield path, value
        if isinstance(value, nn.Module):
            value = value.state_dict()
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{path}.{key}" if path else str(key), entry) for key, entry in value.items()]
