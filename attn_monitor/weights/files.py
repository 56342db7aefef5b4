"""Weights from files of `torch.save` and safetensors and from folders of them, without running code that they hold."""

from __future__ import annotations

import pickle
import re
import stat
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.errors import CheckpointError, first_line

SHARDED = ".metadata"
"""The file by which a folder of `torch.distributed.checkpoint` is known."""

MOST_CLASSES = 200
"""That one file may name beside those of tensors."""

DATA_MODULES = {
    *("collections", "copyreg", "datetime", "numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.dtypes"),
    *("pathlib", "pathlib._local", "typing"),
}
"""Calls of these are how values are pickled, such as paths and NumPy's scalars; calls of others may be any code."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a file or folder by name; they are read when they are needed.

    Attributes:
        shapes: shape by name. Entries of nested dictionaries are named by their path, joined by dots.
        load: reads the tensors of some names.
        skipped: classes of the objects in a file of `torch.save` that were left out.
        stored: what was given to `torch.save`, without those objects; None for other formats.
    """

    shapes: Mapping[str, torch.Size]
    load: Callable[[Iterable[str]], dict[str, Tensor]]
    skipped: tuple[str, ...] = ()
    stored: Any = None

    @staticmethod
    def of(tensors: Mapping[str, Tensor], skipped: Iterable[str] = (), stored: Any = None) -> Weights:
        """Wrap tensors that are in memory or mapped into it."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return Weights(shapes, lambda names: {name: tensors[name] for name in names}, tuple(skipped), stored)


def read_weights(path: Path, *, trust: bool = False) -> Weights:
    """Read what a file or folder of weights holds: of `torch.save`, safetensors or `torch.distributed.checkpoint`.

    Args:
        path: the file, a folder of safetensors, or a folder of a distributed checkpoint.
        trust: unpickle a file of `torch.save` as any pickle, which runs whatever code its author put there.

    Raises:
        FileNotFoundError: there is nothing at the path.
        CheckpointError: it cannot be read, or holds code; ``load`` raises it for tensors that cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path}: does not exist; expected a file or a folder of weights")
    with _errors_name(path):
        weights = _read_any(path, trust)

    def load(names: Iterable[str]) -> dict[str, Tensor]:
        with _errors_name(path):
            tensors = weights.load(names)
            for name, tensor in tensors.items():
                _refuse_expanded(name, tensor)
            return tensors

    return replace(weights, load=load)


def read_stored(path: Path, *, trust: bool = False) -> Any:
    """Return what was given to `torch.save`, without objects of other classes; raises `CheckpointError`."""
    with _errors_name(path):
        return _unpickle(path, trust)[0]


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turn errors of reading into a `CheckpointError` that names the file; a missing file's error does so itself."""
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


def _read_any(path: Path, trust: bool) -> Weights:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _read_folder(path)
    if not stat.S_ISREG(mode):  # reading a pipe would wait for its other end
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


def _read_folder(path: Path) -> Weights:
    if (path / SHARDED).is_file():
        from attn_monitor.weights.sharded import read_sharded

        return read_sharded(path)
    if files := sorted(file for file in path.glob("*.safetensors") if file.is_file()):
        return _read_safetensors(files)
    raise CheckpointError(
        f"a folder without {SHARDED} of torch.distributed.checkpoint and without .safetensors files; give a file"
    )


def _read_safetensors(paths: list[Path]) -> Weights:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(f"a file of safetensors: {error}. Run: pip install safetensors") from error

    files: list[Any] = [safe_open(path, framework="pt") for path in paths]
    holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no dictionary
    shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name, file in holder.items()}
    return Weights(shapes, lambda names: {name: holder[name].get_tensor(name) for name in names})


def _read_torch(path: Path, trust: bool) -> Weights:
    stored, skipped = _unpickle(path, trust)
    tensors = dict(_tensors(stored))
    if not tensors and skipped:
        raise CheckpointError(
            f"no weights outside of its objects of {', '.join(skipped)}, which PyTorch makes by running code. "
            "Save the model's state_dict(), or pass --trust if you know who wrote the file"
        )
    return Weights.of(tensors, skipped, stored)


def _tensors(stored: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries and modules with their paths; each dictionary counts once."""
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


def _unpickle(path: Path, trust: bool) -> tuple[Any, list[str]]:
    """Return what was given to `torch.save`, and the classes of objects in it that were left out."""
    packed = zipfile.is_zipfile(path)
    if packed:
        with path.open("rb") as file:
            refuse_packed_records(file, path.stat().st_size)
    if trust:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=packed), []
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        return _load_plain(path, packed), []
    serialization = torch.serialization
    names = serialization.get_unsafe_globals_in_checkpoint(path) if packed else _globals_before_zip(path)
    if len(names) > MOST_CLASSES or any(name.startswith(("sys.", "os.", "posix.", "nt.")) for name in names):
        raise code_error(names)  # PyTorch reads nothing of these modules, whatever it is allowed
    skipped: dict[str, None] = {}
    absent: list[Any] = [(_Absence(name, (_Absent,), {"skipped": skipped}), name) for name in names]
    with torch.serialization.safe_globals(absent), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pickle's version, and what torch will not support
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed), list(skipped)


def _load_plain(path: Path, packed: bool) -> Any:
    """Load a file of tensors and plain values alone, as PyTorch before 2.6 cannot leave other objects out."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except pickle.UnpicklingError as error:
        found = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if found is None:
            raise
        raise CheckpointError(
            f"it holds objects beside tensors, such as a {found[1]}, which PyTorch {torch.__version__} cannot leave "
            "out. Update PyTorch to 2.6 or newer, or pass --trust if you know who wrote the file"
        ) from error


def _globals_before_zip(path: Path) -> list[str]:
    """Return the classes and functions that a file of PyTorch before 1.6 names, which is four pickles in a row."""
    found: set[str] = set()
    with path.open("rb") as file, suppress(EOFError, pickle.UnpicklingError):  # torch.load says what is wrong with it
        for _ in range(4):
            found |= torch._weights_only_unpickler.get_globals_in_pkl(file)
    return sorted(found)


class _Absence(type):
    """Class of what stands for another class or function while a file is read; only code in a file calls it."""

    def __call__(cls: Any, *_: Any) -> Any:
        module = cls.__name__.rpartition(".")[0]
        if module not in DATA_MODULES:
            raise code_error([cls.__name__])
        return OrderedDict() if module == "collections" else object.__new__(cls)


class _Absent(metaclass=_Absence):
    """What stands for an object of another class: an empty dictionary, into which PyTorch lets a file put entries."""

    skipped: dict[str, None]

    def __new__(cls, *_: Any) -> Any:
        cls.skipped[cls.__name__] = None
        return OrderedDict()

    def __setstate__(self, state: Any) -> None:
        """Keep nothing of a value's state."""


def code_error(names: Iterable[str]) -> CheckpointError:
    """Return the error for a file that names functions which may be any code."""
    found = sorted(names, key=lambda name: name.partition(".")[0] in {"torch", *DATA_MODULES})
    more = ", …" if len(found) > 3 else ""
    return CheckpointError(
        f"unpickling it would call {', '.join(found[:3])}{more}, which may be any code; nothing was run. "
        "Pass --trust if you know who wrote the file"
    )


def refuse_packed_records(file: Any, size: int) -> None:
    """Raise `CheckpointError` where records would unpack to more than the file: `torch.save` never packs them."""
    with zipfile.ZipFile(file) as records:
        for record in records.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{record.filename} is packed ({record.file_size:,} bytes from {record.compress_size:,}), as "
                    "torch.save never does"
                )
        if (total := sum(record.file_size for record in records.infolist())) > size:
            raise CheckpointError(f"its records claim {total:,} bytes, more than the {size:,} of the file")


def _refuse_expanded(name: str, tensor: Tensor) -> None:
    """Raise `CheckpointError` where strides repeat a few bytes so often that a copy could fill the memory."""
    if tensor.layout == torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} is {tuple(tensor.shape)}, more than the bytes stored for it")
