"""Output of the commands: a folder for results, progress bars, notes, and tables of metrics."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np
from PIL import Image

from attn_monitor.draw.canvas import Pixels
from attn_monitor.errors import ProbeError
from attn_monitor.snapshot import Snapshot

try:
    from tqdm import tqdm
except ModuleNotFoundError:  # as functions, from a notebook, commands work without progress bars
    tqdm = None

PNG_LEVEL = 4  # takes half the time of Pillow's own 6, for files that are a twentieth larger

Item = TypeVar("Item")


def check_out(folder: Path) -> None:
    """Raise `OSError` where a folder for results cannot be made, before anything takes time; nothing is made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = f"{nearest} is a file" if nearest.is_file() else f"{nearest} is read-only"
        raise OSError(f"out={folder}: cannot be written to ({reason}); pass another folder")


@contextmanager
def writing_to(folder: Path) -> Iterator[Path]:
    """Make a folder for results; `OSError` with its name where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise OSError(f"out={folder}: cannot be written to ({reason}); pass another folder, or make room") from error


class Results:
    """The files that a command writes into a folder; each path is printed on stdout, above a progress bar."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: set[Path] = set()

    def save(self, path: Path, picture: Pixels) -> None:
        """Save a picture, uint8 (height, width, 3), as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(picture)).save(path, compress_level=PNG_LEVEL)
        self.add(path)

    def add(self, path: Path) -> None:
        """Add a complete file."""
        self._written.add(path)
        print_path(path)

    def others(self) -> list[Path]:
        """List files of the same kinds in the same folders that this call has not written."""
        folders, kinds = {path.parent for path in self._written}, {path.suffix for path in self._written}
        found = (path for folder in sorted(folders) for path in sorted(folder.iterdir()) if path.suffix in kinds)
        return [path for path in found if path not in self._written]


@contextmanager
def results_in(folder: Path) -> Iterator[Results]:
    """Make a folder for results; at the end a note on stderr says which other files are in it."""
    with writing_to(folder):
        results = Results(folder)
        yield results
        if others := results.others():
            notify(f"{folder} also holds {len(others)} files that are not of this call, such as {others[0].name}")


def progress(items: Iterable[Item], doing: str, total: int | None = None) -> Iterable[Item]:
    """Yield the items below a progress bar on stderr; without one where stderr is no terminal, or without tqdm."""
    if tqdm is None:
        return items
    bar: Iterable[Item] = tqdm(items, doing, total, leave=False, file=sys.stderr, disable=None)
    return bar


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Show on stderr what is being done; nothing where stderr is no terminal, or without tqdm."""
    settings = {"bar_format": "{desc}", "leave": False, "file": sys.stderr, "disable": None}
    with nullcontext() if tqdm is None else tqdm(desc=f"{what} …", **settings):
        yield


def print_path(path: Path) -> None:
    """Print a result on stdout, above a progress bar."""
    _print(str(path), sys.stdout)


def notify(text: str) -> None:
    """Print a line on stderr, apart from results and above a progress bar."""
    _print(text, sys.stderr)


def _print(text: str, file: TextIO) -> None:
    print(text, file=file) if tqdm is None else tqdm.write(text, file=file)


def check_all_read(unreadable: Sequence[str]) -> None:
    """Raise `ProbeError` at the end of a command if images were left out."""
    if unreadable:
        are = "image is" if len(unreadable) == 1 else "images are"
        raise ProbeError(f"{len(unreadable)} {are} left out that cannot be read: {'; '.join(unreadable)}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts in columns as wide as their widest cell; the first row holds titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_metrics(snapshot: Snapshot, title: str | None = None) -> None:
    """Print means over heads and images, one line for each role and layer, below a title."""
    print(f"{title or f'metrics at step {snapshot.step:,}'}:")
    for role, layer in snapshot.layers:
        values = snapshot.metrics.of_layer(role, layer)
        print(f"  {role}, layer {layer}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
