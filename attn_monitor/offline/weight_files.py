"""Tensors by name from files and folders of weights: PyTorch's, safetensors, sharded; pickled code is never run."""

from __future__ import annotations

import io
import pickle
import re
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.errors import CheckpointError

MOST_CLASSES = 200  # of which one file may hold objects
DATA_MODULES = {  # what is pickled as a call of these is a value, such as a path or a NumPy scalar
    "collections",
    "copyreg",
    "datetime",
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.dtypes",
    "pathlib",
    "pathlib._local",
    "typing",
}


@dataclass(frozen=True)
class Weights:
    """Names and shapes of what a file holds, and a function that reads one tensor.

    ``skipped`` are the classes of other objects in it, which were not made.
    """

    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]
    skipped: tuple[str, ...] = ()

    @staticmethod
    def of(tensors: Mapping[str, Tensor], skipped: tuple[str, ...] = ()) -> Weights:
        """Those that are in memory, or mapped into it."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return Weights(shapes, lambda name: not_larger_than_stored(name, tensors[name]), skipped)


def read_weights(path: Path, *, trust: bool = False) -> Weights:
    """What a file of `torch.save` or of safetensors holds, a folder of the latter, or one of distributed checkpoints.

    Entries of nested dictionaries are named by their path, joined by dots. With ``trust``, files of `torch.save` are
    unpickled like any pickle: their author may run what they want. Raises `CheckpointError`.
    """
    with _damage_as_checkpoint_error(path):
        weights = _read_any(path, trust)

    def read(name: str) -> Tensor:
        with _damage_as_checkpoint_error(path):
            return weights.read(name)

    return Weights(weights.shapes, read, weights.skipped)


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
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"checkpoint {path}: no readable file of weights, or damaged ({reason})") from error


def first_line(error: BaseException) -> str:
    """What an error says first, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_folder(path: Path) -> Weights:
    from attn_monitor.offline.sharded_weights import METADATA, read_sharded

    if (path / METADATA).exists():
        return read_sharded(path)
    if files := sorted(path.glob("*.safetensors")):
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
    packed = zipfile.is_zipfile(path)
    if packed:
        with path.open("rb") as file:
            refuse_packed_records(file, path.stat().st_size)
    if trust:
        return Weights.of(dict(_tensors(torch.load(path, map_location="cpu", weights_only=False, mmap=packed))))
    stored, classes = unpickle_data(path, mmap=packed)
    tensors = dict(_tensors(stored))
    if not tensors and classes:
        raise CheckpointError(
            f"no weights outside of the objects in it, of {', '.join(classes)}, which are code to PyTorch. "
            "Save the model's state_dict(), or pass --trust if you know who wrote the file"
        )
    return Weights.of(tensors, tuple(classes))


def refuse_packed_records(file: Any, size: int) -> None:
    """Records of `torch.save` are stored as they are: what would unpack to more than the file is none of its files."""
    with zipfile.ZipFile(file) as records:
        for record in records.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{record.filename} is packed ({record.file_size:,} bytes from {record.compress_size:,}), as "
                    "torch.save never does"
                )
        if (total := sum(record.file_size for record in records.infolist())) > size:
            raise CheckpointError(f"its records claim {total:,} bytes, more than the {size:,} of the file")


def not_larger_than_stored(name: str, tensor: Tensor) -> Tensor:
    """The tensor, unless its strides repeat few bytes often, so that a copy could fill the memory."""
    if tensor.layout == torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} is {tuple(tensor.shape)}, more than the bytes stored for it")
    return tensor


def unpickle_data(source: Path | io.BytesIO, *, mmap: bool) -> tuple[Any, list[str]]:
    """Tensors in dictionaries and lists, and the classes of all else: those objects are left out, no code is run."""
    absent: dict[str, type] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(absence, name) for name, absence in absent.items()]):
                stored = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
            return stored, [name for name in absent if name.rpartition(".")[0] not in DATA_MODULES]
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+) (was not an allowed global|whose module)", str(error))
            if found is None:
                raise
            name = found[1] if "." in found[1] else f"builtins.{found[1]}"
            if name in absent or len(absent) == MOST_CLASSES or found[2] == "whose module":
                raise _code_error(name) from error
            absent[name] = _Absence(name, (_Absent,), {})
            if isinstance(source, io.BytesIO):
                source.seek(0)


def _code_error(name: str) -> CheckpointError:
    return CheckpointError(
        f"unpickling it would call {name}, which may be any code; nothing was run. "
        "Pass --trust if you know who wrote the file"
    )


class _Absence(type):
    """Class of what stands for another class or function while a file is read; called only by a file's code."""

    def __call__(cls: Any, *_: Any) -> Any:
        module = cls.__name__.rpartition(".")[0]
        if module not in DATA_MODULES:
            raise _code_error(cls.__name__)
        return OrderedDict() if module == "collections" else object.__new__(cls)


class _Absent(metaclass=_Absence):
    """What an object of another class would be: an empty dictionary, into which PyTorch lets a file put entries."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept of a value."""


def _tensors(stored: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dictionaries and modules by path; each dictionary counts once, however often it is held."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", stored)]
    while waiting:
        path, value = waiting.pop(0)
        if isinstance(value, Tensor):
            yield path, value
        if isinstance(value, nn.Module):
            value = value.state_dict()
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{path}.{key}" if path else str(key), entry) for key, entry in value.items()]
