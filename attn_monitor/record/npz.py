"""The archive's `.npz` files with a JSON header: atomic writing, and reading of untrusted files.

`numpy.load(path, allow_pickle=False)` reads them too. Here a member is read by name, after a check that its shape and
type are those of the header; other members are never unpacked, so that crafted ones do no harm.
"""

from __future__ import annotations

import json
import math
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
from attn_monitor.record.atomic_file import atomic_file
from attn_monitor.record.header_fields import Fields

FORMAT = 2  # unchanged by optional additions
HEADER_BYTES = 64 << 20  # limit of JSON in UTF-32; metrics of every head of a thousand layers take a tenth
PACKED_BYTES = 256 << 20  # larger files are written without compression

Shape = tuple["int | None", ...]
"""Expected sizes of an array; None for one that the header does not give."""
TensorReader = Callable[[str, Sequence[str], Shape], "Tensor | None"]
"""Reads a stored tensor by name, of one of these types and this shape, see `NpzFile.tensor`."""


def write_npz(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write a file atomically, synced to the disk.

    Args:
        path: The file; its folder is created.
        header: Values for JSON.
        arrays: Arrays by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = np.array(header_text(header))
    packed = text.nbytes + sum(array.nbytes for array in arrays.values()) <= PACKED_BYTES
    save: Callable[..., None] = np.savez_compressed if packed else np.savez
    with atomic_file(path, sync=True) as file:
        save(file, header=text, **arrays)


class NpzFile:
    """An open file: its header, and tensors that are read by name."""

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self._file = file
        self._left = max(size, PACKED_BYTES)  # bytes that may still be unpacked
        self.header = parse_header(self._read_header())

    def tensor(self, name: str, dtypes: Sequence[str], shape: Shape) -> Tensor | None:
        """Read a tensor, or return None if the file has none of this name.

        Args:
            name: Name of the member.
            dtypes: Names of the allowed types.
            shape: Expected shape.

        Raises:
            ArchiveError: The shape or type is another, or the member is damaged.
        """
        try:
            member = self._file.getinfo(f"{name}.npy")
        except KeyError:
            return None
        with _damage_as_archive_error(name):
            return torch.from_numpy(self._read(member, name, dtypes, shape))

    def _read_header(self) -> str:
        with _damage_as_archive_error("header"):
            member = self._file.getinfo("header.npy")
            if member.file_size > HEADER_BYTES:
                raise ArchiveError(f"its header has {member.file_size:,} bytes, expected at most {HEADER_BYTES:,}")
            return str(self._read(member, "header", None, ()))

    def _read(
        self, member: zipfile.ZipInfo, name: str, dtypes: Sequence[str] | None, shape: Shape
    ) -> np.ndarray[Any, Any]:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"{name} has compression method {member.compress_type}, expected stored or deflated")
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
                raise ArchiveError(f"{name} does not have the {size:,} bytes of its shape {found}")
        array: np.ndarray[Any, Any] = np.frombuffer(bytearray(content), dtype)  # torch needs a writable array
        return array.reshape(found, order="F" if fortran_order else "C")


@contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """Open a file of `write_npz`; every `ArchiveError` raised within the context names the file."""
    try:
        with _damage_as_archive_error("the file"):
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
                raise ArchiveError("not a regular file")
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


def tensor_reader(stored: Mapping[str, Any]) -> TensorReader:
    """Return a reader of a checkpoint's tensors that checks them like those of a file."""

    def read(name: str, dtypes: Sequence[str], shape: Shape) -> Tensor | None:
        value = stored.get(name)
        if value is not None and not isinstance(value, Tensor):
            raise ArchiveError(f"{name} is a {type(value).__name__}, expected a tensor")
        if value is not None:
            check_array(name, value.shape, str(value.dtype).removeprefix("torch."), dtypes, shape)
        return value

    return read


def header_text(header: Mapping[str, Any]) -> str:
    """Write a header as JSON, with the version of the format."""
    return json.dumps({"format": FORMAT, **header})


def parse_header(text: str) -> Fields:
    """Parse `header_text`; `ArchiveError` if it is invalid, or of a format that only newer versions read."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"the header is no JSON ({error})") from error
    header = Fields(values, "header")
    found = header.integer("format", least=1)
    if found > FORMAT:
        raise ArchiveError(
            f"written by a newer version of attn_monitor, in format {found}; this version reads up to format {FORMAT}. "
            "Update attn_monitor to open it"
        )
    return header


def check_array(name: str, found: Sequence[int], dtype: str, dtypes: Sequence[str], shape: Shape) -> None:
    """Raise `ArchiveError` for an array of another shape or type than the header gives."""
    fits = len(found) == len(shape) and all(
        (size >= 1 if wanted is None else size == wanted) for size, wanted in zip(found, shape, strict=True)
    )
    if not fits or dtype not in dtypes:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ArchiveError(f"{name} is {dtype} {tuple(found)}, expected {' or '.join(dtypes)} ({expected})")
