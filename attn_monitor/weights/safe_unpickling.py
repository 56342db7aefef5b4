"""What `torch.save` wrote, without running what is pickled in it, and without unpacking more than the file holds."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

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


def unpickle_data(source: Path | io.BytesIO, *, mmap: bool) -> tuple[Any, list[str]]:
    """Tensors in dictionaries, and the classes of other objects in the file: those are left out, and no code is run.

    Raises `CheckpointError` where making an object would call something that may be code.
    """
    absent: dict[str, type] = {}
    while True:
        try:
            with (
                torch.serialization.safe_globals([(absence, name) for name, absence in absent.items()]),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # of the pickle's version and of what torch will not support
                stored = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
            return stored, [name for name in absent if name.rpartition(".")[0] not in {*DATA_MODULES, "builtins"}]
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
