"""Run a function in a fork of this process, so that it changes nothing in the user's objects here.

Only a fork copies everything: counters, generators and caches in objects, closures, modules and libraries, arrays of
any size, and what cannot be pickled. What a fork still shares (memory, open files, connections) is detached first.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import mmap
import os
import pickle
import select
import signal
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import torch

from attn_monitor.distributed import portable

Result = TypeVar("Result")

END_SECONDS = 5.0  # timeout for the end of a killed fork: one that waits for a lost network disk cannot be killed
SECONDS = 60.0  # timeout, as a fork hangs on a lock that another thread held when it was made
COPIED = 1 << 26  # bytes; larger pieces of shared memory become read-only, as copying them takes too long
MREMAP_MAYMOVE_FIXED = 3


class CopyError(RuntimeError):
    """This process could not be forked, or its fork has not answered."""


def call_in_fork(function: Callable[[], Result], *, seconds: float = SECONDS) -> Result:
    """Call a function in a fork of this process and return its result.

    In the fork, reading and random draws work. Printing has no effect; writing to files and using a device fail.

    Args:
        function: a function; its result is pickled.
        seconds: how long to wait for the result.

    Raises:
        CopyError: The system cannot fork, or the fork dies, does not answer in time or cannot read the data. Any other
            exception of the function is raised as it is.
    """
    if sys.platform != "linux":
        raise CopyError(f"data can be read without changing them on Linux only, and this is {sys.platform}")
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of locks that other threads may hold: see SECONDS
        process = os.fork()
    if process == 0:
        _answer(function, sending)
    os.close(sending)
    try:
        answer = _read_all(receiving, time.monotonic() + seconds)
    except TimeoutError:
        raise CopyError(f"no answer within {seconds:.0f} s") from None
    finally:
        os.close(receiving)
        status = _end(process)
    if not answer:
        raise CopyError(f"the fork was ended by {_signal_name(status)}")
    worked, result = pickle.loads(answer)
    if isinstance(result, (OSError, EOFError)) and not worked:
        raise CopyError(
            f"{type(result).__name__}: {result}. This was raised in a fork of this process that reads the data: in it "
            "no file can be written, and pipes and connections lead nowhere"
        )
    if not worked:
        raise result
    return result  # type: ignore[no-any-return]


def _read_all(receiving: int, deadline: float) -> bytes:
    """Read a pipe to its end. Raises `TimeoutError`."""
    parts: list[bytes] = []
    poll = select.poll()
    poll.register(receiving, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        part = os.read(receiving, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
    raise TimeoutError


def _end(process: int) -> int:
    """Kill the fork if it still runs, and return its exit status."""
    deadline = time.monotonic() + END_SECONDS
    try:
        ended, status = os.waitpid(process, os.WNOHANG)
        if not ended:
            os.kill(process, signal.SIGKILL)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.001)
            ended, status = os.waitpid(process, os.WNOHANG)
    except ChildProcessError:  # other code waits for all child processes
        return 0
    if not ended:
        threading.Thread(target=_reap, args=(process,), daemon=True).start()
        return signal.SIGKILL
    return status


def _reap(process: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(process, 0)


def _signal_name(status: int) -> str:
    return (
        signal.Signals(os.WTERMSIG(status)).name
        if os.WIFSIGNALED(status)
        else f"exit status {os.waitstatus_to_exitcode(status)}"
    )


def _answer(function: Callable[[], Any], sending: int) -> NoReturn:
    """Answer in the fork, and exit without the clean-up handlers of the parent process."""
    status = 1
    try:
        try:
            _keep_to_itself(sending)
            answer = pickle.dumps((True, function()))
            status = 0
        except BaseException as error:  # SystemExit of the data too
            answer = pickle.dumps((False, portable(error, CopyError)))
        with open(sending, "wb", closefd=False) as pipe:
            pipe.write(answer)
    finally:
        os._exit(status)


def _keep_to_itself(sending: int) -> None:
    """Isolate the fork: only what it writes to ``sending`` reaches another process from here on."""
    import resource  # exists on Unix only

    for number in signal.valid_signals():  # the run's handlers requeue jobs or save checkpoints
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    gc.disable()  # finalizers belong to the run, too
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode, logging.raiseExceptions = True, False
    libc = ctypes.CDLL(None, use_errno=True)
    _take_memory(libc)
    _take_files(sending)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    _take_rights(libc)
    sys.addaudithook(_refuse_to_write)  # for kernels without Landlock, and for sockets
    torch.set_num_threads(1)  # OpenMP's other threads were not forked


def _take_memory(libc: ctypes.CDLL) -> None:
    """Replace shared memory by private copies; large pieces become read-only, and writing to them ends the fork."""
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    size_t, pointer = ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.argtypes = [pointer, size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mremap.argtypes = [pointer, size_t, size_t, ctypes.c_int, pointer]
    libc.mprotect.argtypes = [pointer, size_t, ctypes.c_int]
    failed = ctypes.c_void_p(-1).value
    for start, size in _shared_memory():
        if size > COPIED:
            done = libc.mprotect(start, size, mmap.PROT_READ) == 0
        else:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            copy = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0)
            if done := copy != failed:
                ctypes.memmove(copy, start, size)
                done = libc.mremap(copy, size, size, MREMAP_MAYMOVE_FIXED, start) != failed
        if not done:
            raise CopyError(f"shared memory cannot be copied: {os.strerror(ctypes.get_errno())}")


def _shared_memory() -> list[tuple[int, int]]:
    """List start and size of writable shared mappings, without those of devices."""
    found = []
    with open("/proc/self/maps") as file:
        for line in file:
            span, rights, _, _, _, *name = line.split(maxsplit=5)
            path = name[0].strip() if name else ""
            device = path.startswith("/dev/") and not path.startswith(("/dev/shm/", "/dev/zero", "/dev/hugepages/"))
            if rights[1] == "w" and rights[3] == "s" and not device and not path.startswith("anon_inode:"):
                start, end = (int(number, 16) for number in span.split("-"))
                found.append((start, end - start))
    return found


def _take_files(sending: int) -> None:
    """Reopen files read-only with a position of their own, and redirect pipes and connections to the null device."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            mode = os.fstat(number).st_mode
        except OSError:  # the descriptor of the listing itself
            continue
        if number in (sending, nowhere) or (number > 2 and (stat.S_ISDIR(mode) or stat.S_ISCHR(mode))):
            continue
        opened = nowhere
        if number > 2 and stat.S_ISREG(mode):
            try:
                opened = os.open(f"/proc/self/fd/{number}", os.O_RDONLY)
                os.lseek(opened, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
            except OSError:  # may not be read
                opened = nowhere
        os.dup2(opened, number, inheritable=False)
        if opened != nowhere:
            os.close(opened)


def _take_rights(libc: ctypes.CDLL) -> None:
    """Forbid compiled code too to make, change or remove files, by Landlock if the kernel has it."""
    create, restrict, version_asked, no_new_privileges = 444, 446, 1, 38
    version = libc.syscall(create, None, 0, version_asked)
    write_remove_make, truncate = 0b1_1111_1111_0010, (1 << 14 if version >= 3 else 0)
    rights = ctypes.c_uint64(write_remove_make | truncate)
    if version > 0 and libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0:
        libc.syscall(restrict, libc.syscall(create, ctypes.byref(rights), ctypes.sizeof(rights), 0), 0)


_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def _refuse_to_write(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse to write cache files, which the run would find, and to reach the servers of shared dictionaries."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        refused = bool(writes) and path != os.devnull and not isinstance(path, int)
    else:
        path = arguments[1] if event == "socket.connect" else arguments[:1]
        refused = event in _CHANGES or (event == "socket.connect" and isinstance(path, (str, bytes)))
    if refused:
        raise PermissionError(f"the data write to {path!r} when they are read")
