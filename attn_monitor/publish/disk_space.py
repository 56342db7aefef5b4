"""The part of a disk that the monitor leaves to the user's own files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from attn_monitor.publish.failures import Failures, Paused


class DiskReserveError(OSError):
    """Writing would take what is left free on purpose."""


def check_reserve(reserve: int | None) -> int | None:
    """The setting ``disk_reserve``, if it is one: bytes, or None for the smaller of 1 GB and 1 % of the disk."""
    if reserve is not None and (isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 0):
        raise ValueError(
            f"disk_reserve={reserve!r}: expected a number of bytes from 0 on, or None for the smaller of 1 GB and "
            "1 % of the disk"
        )
    return reserve


class Space:
    """Keeps pictures and archive off a disk with less than ``reserve`` bytes free: one warning for each disk."""

    def __init__(self, failures: Failures, reserve: int | None = None) -> None:
        self._failures, self._reserve = failures, check_reserve(reserve)
        self._short: dict[int, tuple[str, int]] = {}  # by disk, the part that was told and the bytes it lacked

    def require(self, folder: Path | None, size: int) -> None:
        """Raise `Paused` if writing ``size`` bytes there (None: to no disk) would take some of the reserve."""
        if folder is None or self._reserve == 0:
            return
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        disk, usage = os.stat(place).st_dev, shutil.disk_usage(place)
        reserve = min(10**9, usage.total // 100) if self._reserve is None else self._reserve
        part, lacked = self._short.get(disk, (f"keeping disk_reserve free in {place}: writing pictures and archive", 0))
        if usage.free - size < reserve:
            self._short[disk] = part, max(lacked, size)
            text = f"{_amount(usage.free)} are free, disk_reserve is {_amount(reserve)}; they are paused until there is"
            self._failures.failed(part, DiskReserveError(f"{text} more"))
            raise Paused(part)
        if disk in self._short and usage.free - lacked >= reserve:  # room for the largest, so that it does not flap
            del self._short[disk]
            self._failures.worked(part)


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
