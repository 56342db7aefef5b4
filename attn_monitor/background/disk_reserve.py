"""Keep a part of each disk free for the user's own files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from attn_monitor.errors import check_whole


class DiskReserveError(OSError):
    """Writing would use disk space that is to stay free."""


def check_reserve(reserve: int | None) -> int | None:
    """Return the setting ``disk_reserve``, or raise an error if it is invalid.

    Args:
        reserve: bytes from 0 on, or None for the smaller of 1 GB and 1 % of the disk.

    Raises:
        ArgumentError: The value is neither.
    """
    expected = "a number of bytes from 0 on, or None for the smaller of 1 GB and 1 % of the disk"
    check_whole("disk_reserve", reserve, 0, expected)
    return reserve


def require_space(folder: Path | None, size: int, reserve: int | None) -> None:
    """Check that a disk has space for a file and its reserve.

    Args:
        folder: where to write; None, for no disk, passes.
        size: bytes to write.
        reserve: bytes to keep free, see `check_reserve`.

    Raises:
        DiskReserveError: Less would stay free.
    """
    if folder is None or reserve == 0:
        return
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(place)
    if not usage.total or not os.access(place, os.W_OK):
        return  # the write itself raises the right error
    kept = min(10**9, usage.total // 100) if reserve is None else reserve
    if usage.free - size < kept:
        raise DiskReserveError(
            f"{_amount(usage.free)} are free in {folder}, {_amount(size)} are to be written, and disk_reserve is "
            f"{_amount(kept)}. Delete files there, or set a smaller disk_reserve"
        )


def _amount(size: int) -> str:
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB") if size >= 1e5 else (1e3, "KB")
    return f"{size / unit:.1f} {name}"
