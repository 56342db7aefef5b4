"""Whose an archive folder is: a file in it names the run, and is locked while a process of that run writes there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

CLAIM = "run.jsonl"  # one line for each process that has written here, the first one with the run's id
LONGEST = 1 << 16  # bytes of it that are looked at

# (process, folder). Closing any handle of a claim drops the lock on it: one that is held here is not opened again.
_held: set[tuple[int, Path]] = set()


class Claim:
    """A folder that this process alone writes to, until it is released or the process ends, however it ends.

    ``run`` is the id to keep in checkpoints, by which a resumed run finds its folder again. ``note`` says why the
    folder is not the one that was to be expected; empty where it is.
    """

    def __init__(self, folder: Path, run: str, handle: int | None, note: str = "") -> None:
        self.folder, self.run, self.note = folder, run, note
        self._handle, self._key = handle, (os.getpid(), folder)
        if handle is not None:
            self._hold()

    def renew(self) -> None:
        """Claim the folder again where it was deleted, or could not be made before; `OSError` where another run has."""
        with suppress(FileNotFoundError):
            if self._handle is not None and os.path.samestat(os.stat(self.folder / CLAIM), os.fstat(self._handle)):
                return
        handle = _create(self.folder, empty=False)
        if handle is None:
            raise FileExistsError(f"{self.folder} was deleted in mid-run and is another run's now")
        _sign(handle, self.run)
        if self._handle is not None:
            os.close(self._handle)
        self._handle = handle
        self._hold()

    def _hold(self) -> None:
        self._key = os.getpid(), self.folder.resolve()
        _held.add(self._key)

    def release(self) -> None:
        """Let others have the folder; one in which nothing has been written is removed."""
        if self._handle is None:
            return
        with suppress(OSError):
            if [path.name for path in self.folder.iterdir()] == [CLAIM]:
                (self.folder / CLAIM).unlink()
                self.folder.rmdir()
        os.close(self._handle)
        self._handle = None
        _held.discard(self._key)


def claim_free(root: Path, base: str, first: int = 1) -> Claim:
    """The first folder of ``base``, ``base-2``, ``base-3``, … from number ``first`` on that is empty and nobody's.

    Where none can be made now, as on a full disk, it is `claim_later`'s.
    """
    run = secrets.token_hex(8)
    try:
        for name in _names(base, first):
            handle = _create(root / name)
            if handle is not None:
                _sign(handle, run)
                wanted = next(_names(base, first))
                note = "" if name == wanted else f"{root / wanted} is another run's, so this one writes to {name}"
                return Claim(root / name, run, handle, note)
    except OSError as error:
        return claim_later(root, base, error)
    raise AssertionError("there is always another number")


def claim_later(root: Path, base: str, error: Exception) -> Claim:
    """A folder that nobody else can have, as its name has the run's id, to be made when it is written to."""
    run = secrets.token_hex(8)
    folder = root / f"{base}-{run}"
    return Claim(folder, run, None, f"no archive folder could be made ({error}); {folder} is tried later")


def claim_again(folder: Path, run: str | None) -> Claim | None:
    """The folder that this run has written to before, None where it is another's or another process writes there.

    ``run`` is None for a run of the first stage, which left no claim.
    """
    try:
        if run is None:
            handle, run = _create(folder, empty=False), secrets.token_hex(8)
        else:
            handle = _open(folder, run)
        if handle is None:
            return None
        _sign(handle, run)
    except OSError:
        return None
    return Claim(folder, run, handle)


def claim_to_fill(folder: Path) -> Claim | None:
    """An archive folder to add to, whoever began it; None where a process writes there now.

    What is added has to belong there, which the caller knows.
    """
    if (os.getpid(), folder.resolve()) in _held:
        return None
    return claim_again(folder, _owner(folder))


def _names(base: str, first: int) -> Iterator[str]:
    return (base if number == 1 else f"{base}-{number}" for number in itertools.count(first))


def _create(folder: Path, *, empty: bool = True) -> int | None:
    """A new claim; None where there is one already, or anything else in a folder that is to be empty."""
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
    """The claim that this run left, None where it is another's or in use."""
    if (os.getpid(), folder.resolve()) in _held:
        return None
    try:
        handle = os.open(folder / CLAIM, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:  # nobody else has a name with this id in it
        return _create(folder, empty=False) if folder.name.endswith(f"-{run}") else None
    if _lock(handle) and _signed_by(handle) == run and (folder / CLAIM).exists():
        return handle
    os.close(handle)
    return None


def _lock(handle: int) -> bool:
    """False where another process holds it. Where files cannot be locked, what the claim says has to do.

    The system drops the lock when the process ends, and a forked worker does not inherit it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _sign(handle: int, run: str) -> None:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "started": started}
    with suppress(OSError):  # a full disk: the folder is ours all the same, but a resumed run takes another
        os.write(handle, (json.dumps(line) + "\n").encode())


def _owner(folder: Path) -> str | None:
    try:
        handle = os.open(folder / CLAIM, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _signed_by(handle)
    finally:
        os.close(handle)


def _signed_by(handle: int) -> str | None:
    try:
        first = json.loads(os.read(handle, LONGEST).partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None
    run = first.get("run") if isinstance(first, dict) else None
    return run if isinstance(run, str) else None
