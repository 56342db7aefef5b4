"""The archive's files: an `.npz` with a JSON header, written whole or not at all, and read no further than expected.

`numpy.load(path, allow_pickle=False)` reads them too. Here members are read by name, each only once its shape and type
are known to be those that the header promises: members that nobody asks for cost nothing, whatever they hold.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from attn_monitor.errors import ArchiveError
from attn_monitor.record.header_fields import Fields

FORMAT = 2  # additions are optional, so that this number stays
HEADER_BYTES = 64 << 20  # of JSON as UTF-32; a thousand layers' metrics of every head take a tenth
PACKED_BYTES = 256 << 20  # files that would unpack to more are stored as they are, see `write_npz`
WRITING = ".writing-"  # how the names of files begin that are not complete

Shape = tuple["int | None", ...]
"""Sizes that an array must have; None for one that the header does not tell."""
TensorReader = Callable[[str, Sequence[str], Shape], "Tensor | None"]
"""Gives a stored tensor by name, if it has one of these types and this shape, see `NpzFile.tensor`."""


def write_npz(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write under a temporary name, to disk, and rename: complete or not there at all. The umask decides who reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = re.sub(r"[^\w-]", "_", socket.gethostname())[:60]
    temporary = path.parent / f"{WRITING}{owner}-{os.getpid()}-{secrets.token_hex(4)}.npz"
    text = np.array(json.dumps({"format": FORMAT, **header}))
    packed = text.nbytes + sum(array.nbytes for array in arrays.values()) <= PACKED_BYTES
    try:
        with temporary.open("xb") as file:
            save: Callable[..., None] = np.savez_compressed if packed else np.savez
            save(file, header=text, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class NpzFile:
    """An open file: its header, and arrays by name as they are asked for."""

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self._file = file
        self._left = max(size, PACKED_BYTES)  # bytes that may still be unpacked
        self.header = Fields(self._read_header(), "header")
        check_format(self.header)

    def tensor(self, name: str, dtypes: Sequence[str], shape: Shape) -> Tensor | None:
        """An array of this shape and one of these types, None where the file has none of this name."""
        try:
            member = self._file.getinfo(f"{name}.npy")
        except KeyError:
            return None
        with _damage_as_archive_error(name):
            return torch.from_numpy(self._read(member, name, dtypes, shape))

    def _read_header(self) -> Any:
        with _damage_as_archive_error("header"):
            member = self._file.getinfo("header.npy")
            if member.file_size > HEADER_BYTES:
                raise ArchiveError(f"its header has {member.file_size:,} bytes, expected at most {HEADER_BYTES:,}")
            return parse_json(str(self._read(member, "header", None, ())))

    def _read(
        self, member: zipfile.ZipInfo, name: str, dtypes: Sequence[str] | None, shape: Shape
    ) -> np.ndarray[Any, Any]:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"{name} is compressed by method {member.compress_type}, which is not read here")
        with self._file.open(member) as stream:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            found, fortran_order, dtype = read(stream)
            if dtypes is None and dtype.kind != "U":
                raise ArchiveError(f"{name} is {dtype}, expected text")
            check_array(name, found, dtype.name, dtypes or [dtype.name], shape)
            size = math.prod(found) * dtype.itemsize
            self._left -= size
            if self._left < 0:
                raise ArchiveError(f"{name} would unpack to {size:,} bytes, more than a file of this size can hold")
            content = stream.read(size)
            if len(content) != size or stream.read(1):  # reading to the end compares the checksum
                raise ArchiveError(f"{name} has not the {size:,} bytes of its shape {found}")
        array: np.ndarray[Any, Any] = np.frombuffer(bytearray(content), dtype)  # torch wants what can be written to
        return array.reshape(found, order="F" if fortran_order else "C")


@contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """Read what `write_npz` wrote; every `ArchiveError` raised meanwhile names the file."""
    try:
        with _damage_as_archive_error("the file"):
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
                raise ArchiveError("not a file")
            file = zipfile.ZipFile(path)
        with file:
            yield NpzFile(file, path.stat().st_size)
    except ArchiveError as error:
        raise ArchiveError(f"{path}: {error}") from error


@contextmanager
def _damage_as_archive_error(what: str) -> Iterator[None]:
    try:
        yield
    except (ArchiveError, FileNotFoundError):
        raise
    except OSError as error:
        raise ArchiveError(f"{what} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # zip, zlib, NumPy's parser and JSON each have their own errors for damaged files
        reason = f"{type(error).__name__}: {error}"
        raise ArchiveError(f"{what} is not readable: damaged, or not of attn_monitor ({reason})") from error


def tensors_in(stored: Mapping[str, Any]) -> TensorReader:
    """The tensors of a checkpoint's state, with the checks that a file's get."""

    def read(name: str, dtypes: Sequence[str], shape: Shape) -> Tensor | None:
        value = stored.get(name)
        if value is not None and not isinstance(value, Tensor):
            raise ArchiveError(f"{name} is a {type(value).__name__}, expected a tensor")
        if value is not None:
            check_array(name, value.shape, str(value.dtype).removeprefix("torch."), dtypes, shape)
        return value

    return read


def parse_json(text: str) -> Any:
    """What a header says."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"the header is no JSON ({error})") from error


def check_format(header: Fields) -> None:
    """Refuse what a newer version wrote in a format that this one does not know."""
    found = header.integer("format", least=1)
    if found > FORMAT:
        raise ArchiveError(
            f"written by a newer version of attn_monitor, in format {found}; this version reads up to format {FORMAT}. "
            "Update attn_monitor to open it"
        )


def check_array(name: str, found: Sequence[int], dtype: str, dtypes: Sequence[str], shape: Shape) -> None:
    """Refuse an array of another shape or type than the header promises."""
    fits = len(found) == len(shape) and all(
        (size >= 1 if wanted is None else size == wanted) for size, wanted in zip(found, shape, strict=True)
    )
    if not fits or dtype not in dtypes:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ArchiveError(f"{name} is {dtype} {tuple(found)}, expected {' or '.join(dtypes)} ({expected})")


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove what a killed process of this folder's run was writing; the names of the files that went."""
    unfinished = sorted(folder.glob(f"{WRITING}*"))
    for path in unfinished:
        path.unlink(missing_ok=True)
    return unfinished
