"""The lock on a run's archive folder: a file that names the run, locked while one of its processes writes there.

It is a lock of our own and not filelock's, whose releases before 4 leave it to the forked workers of a killed process,
and which empties the file that it locks, so that run and lock would need a file each. POSIX record locks end with the
process, however it ends, are not inherited by forks, and hold on NFS. Nothing here waits for a lock.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from attn_monitor.record.atomic_file import WRITING

CLAIM = "run.jsonl"  # one line for each process that has written here, the first one with the run's id
LONGEST = 1 << 16  # bytes of it that are read
STALE = 3600.0  # seconds after which an unfinished file of a folder without an owner is removed

# (process, folder). Closing any handle of a claim drops the lock on it: one that is held here is not opened again.
_held: set[tuple[int, Path]] = set()


class Claim:
    """A folder that this process alone writes to, until the claim is released or the process ends.

    Attributes:
        folder: the archive.
        run: the id to keep in checkpoints, by which a resumed run finds its folder again.
        note: why the folder is not the expected one; empty where it is.
    """

    def __init__(self, folder: Path, run: str, handle: int | None, note: str = "") -> None:
        """Sign and hold a claim that is open and locked; ``handle`` None: it is made by `renew`."""
        self.folder, self.run, self.note = folder, run, note
        self._handle: int | None = None
        self._key = os.getpid(), folder
        if handle is not None:
            self._hold(handle)

    def renew(self) -> None:
        """Claim the folder again where it was deleted, or could not be made before; `OSError` where another run has."""
        with suppress(FileNotFoundError):
            if self._handle is not None and os.path.samestat(os.stat(self.folder / CLAIM), os.fstat(self._handle)):
                return
        handle = _create(self.folder, empty=False)
        if handle is None:
            raise FileExistsError(f"{self.folder} was deleted in mid-run and is another run's now")
        if self._handle is not None:
            os.close(self._handle)
        self._hold(handle)

    def release(self) -> None:
        """Unlock the folder; one in which nothing has been written is removed."""
        if self._handle is None:
            return
        with suppress(OSError):
            if [path.name for path in self.folder.iterdir()] == [CLAIM]:
                (self.folder / CLAIM).unlink()
                self.folder.rmdir()
        os.close(self._handle)
        self._handle = None
        _held.discard(self._key)

    def _hold(self, handle: int) -> None:
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = {"run": self.run, "host": socket.gethostname(), "pid": os.getpid(), "started": started}
        with suppress(OSError):  # a full disk: the folder is ours all the same, but a resumed run takes another
            os.write(handle, (json.dumps(line) + "\n").encode())
        self._handle, self._key = handle, (os.getpid(), self.folder.resolve())
        _held.add(self._key)


def claim_free(root: Path, base: str, first: int = 1) -> Claim:
    """Claim the first folder of ``base``, ``base-2``, ``base-3``, … that is empty and that no run has.

    Args:
        root: the folder in which it is.
        base: its name.
        first: the number from which on folders are tried; 1 is ``base`` itself.

    Returns:
        The claim; where no folder can be made now, as on a full disk, that of `claim_later`.
    """
    names = (base if number == 1 else f"{base}-{number}" for number in itertools.count(first))
    note = ""
    try:
        for name in names:
            handle = _create(root / name)
            if handle is not None:
                note = note and f"{note}, so this one writes to {name}"
                return Claim(root / name, secrets.token_hex(8), handle, note)
            who = owner(root / name)
            note = note or f"{root / name} is {f'taken by {who}' if who else 'not empty'}"
            remove_stale(root / name)
    except OSError as error:
        return claim_later(root, base, error)
    raise AssertionError("there is always another number")


def claim_later(root: Path, base: str, error: Exception) -> Claim:
    """Name a folder that no other run can have, as the run's id is in it, to be made when it is written to."""
    run = secrets.token_hex(8)
    folder = root / f"{base}-{run}"
    return Claim(folder, run, None, f"no archive folder could be made ({error}); {folder} is tried later")


def claim_again(folder: Path, run: str) -> Claim | None:
    """Claim the folder that this run has written to; None where it is another's or another process writes there."""
    if (os.getpid(), folder.resolve()) in _held:
        return None
    try:
        handle = _open(folder, run)
    except OSError:
        return None
    return None if handle is None else Claim(folder, run, handle)


def claim_to_fill(folder: Path) -> Claim | None:
    """Claim an archive to add to, whichever run began it; None where a process writes there now.

    Whether what is added belongs there is up to the caller. Raises `OSError` where the folder cannot be written to.
    """
    if (os.getpid(), folder.resolve()) in _held:
        return None
    run = next(iter(_lines(folder)), {}).get("run")
    handle = _open(folder, run) if isinstance(run, str) else _create(folder, empty=False)
    return None if handle is None else Claim(folder, str(run or secrets.token_hex(8)), handle)


def owner(folder: Path) -> str:
    """Describe the process that was the last to claim a folder; empty where there is no claim that can be read."""
    if (os.getpid(), folder.resolve()) in _held:
        return "this process"
    lines = [line for line in _lines(folder) if {"pid", "host", "started"} <= line.keys()]
    return "process {pid} on {host} (since {started})".format(**lines[-1]) if lines else ""


def remove_stale(folder: Path) -> None:
    """Remove what killed processes were writing, where nobody holds the claim of an archive folder.

    Files of the last hour stay: a lock may not be seen on other machines.
    """
    with suppress(OSError):
        stale = [path for path in folder.glob(f"{WRITING}*") if path.stat().st_mtime < time.time() - STALE]
        if stale and not _is_held(folder):
            for path in stale:
                path.unlink(missing_ok=True)


def _is_held(folder: Path) -> bool:
    """Whether a process writes there; `OSError` where nobody ever has."""
    if (os.getpid(), folder.resolve()) in _held:
        return True
    handle = os.open(folder / CLAIM, os.O_RDWR)
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def _create(folder: Path, *, empty: bool = True) -> int | None:
    """Make a claim; None where there is one already, or anything else in a folder that has to be empty."""
    if folder.exists() and not folder.is_dir():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    if empty and any(folder.iterdir()):
        return None
    try:  # of all processes that come here at the same time, one succeeds
        handle = os.open(folder / CLAIM, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND, 0o666)
    except FileExistsError:
        return None
    _lock(handle)
    return handle


def _open(folder: Path, run: str) -> int | None:
    """Open and lock the claim that this run left; None where it is another's or in use."""
    try:
        handle = os.open(folder / CLAIM, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:  # no other run has a name with this id in it
        return _create(folder, empty=False) if folder.name.endswith(f"-{run}") else None
    signed = next(iter(_read(handle)), {})
    if _lock(handle) and signed.get("run") == run and (folder / CLAIM).exists():
        return handle
    os.close(handle)
    return None


def _lock(handle: int) -> bool:
    """Lock a claim; False where another process holds it. Where files cannot be locked, the run's id has to do."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _lines(folder: Path) -> list[dict[str, object]]:
    """Read the claim of a folder that this process does not hold; empty where there is none."""
    try:
        handle = os.open(folder / CLAIM, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        return _read(handle)
    finally:
        os.close(handle)


def _read(handle: int) -> list[dict[str, object]]:
    """Return the lines of a claim, empty dictionaries for those that cannot be read."""
    found: list[dict[str, object]] = []
    for line in os.read(handle, LONGEST).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = {}
        found.append(value if isinstance(value, dict) else {})
    return found
