"""`atomic_file`: write a file so that no reader ever finds half of it."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

WRITING = ".writing-"  # prefix of incomplete files


@contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[IO[bytes]]:
    """Open a file under a temporary name, and rename it to ``path`` if the context ends without an error.

    Args:
        path: The file, in an existing folder; one that exists is replaced.
        sync: Wait until the content is on the disk before renaming.
    """
    host = re.sub(r"[^\w-]", "_", socket.gethostname())[:60]
    temporary = path.with_name(f"{WRITING}{host}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        with temporary.open("xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove incomplete files that a killed process left in a folder, and return their paths."""
    unfinished = sorted(folder.glob(f"{WRITING}*"))
    for path in unfinished:
        path.unlink(missing_ok=True)
    return unfinished
