"""The part of a disk that is left to the user's own files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class DiskReserveError(OSError):
    """Writing would take some of the space that is to stay free."""


def check_reserve(reserve: int | None) -> int | None:
    """Check the setting ``disk_reserve``.

    Args:
        reserve: bytes, or None for the smaller of 1 GB and 1 % of the disk.

    Returns:
        The same.

    Raises:
        ValueError: it is neither.
    """
    if reserve is not None and (isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 0):
        raise ValueError(
            f"disk_reserve={reserve!r}: expected a number of bytes from 0 on, or None for the smaller of 1 GB and "
            "1 % of the disk"
        )
    return reserve


def require_space(folder: Path | None, size: int, reserve: int | None) -> None:
    """Check that ``size`` bytes can be written to a folder (None: to no disk) and ``reserve`` bytes stay free.

    Raises:
        DiskReserveError: they cannot.
    """
    if folder is None or reserve == 0:
        return
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(place)
    if not usage.total or not os.access(place, os.W_OK):
        return  # writing itself says why it cannot be done
    kept = min(10**9, usage.total // 100) if reserve is None else reserve
    if usage.free - size < kept:
        raise DiskReserveError(
            f"{_amount(usage.free)} are free in {folder}, and disk_reserve is {_amount(kept)}. Free more than that"
        )


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
