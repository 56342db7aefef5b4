"""`run` and `Popen` as in `subprocess`, for Python alone, without the 7 s of CPU in which a child imports Lightning.

One server a test process has imported what children need and has run nothing. It forks for each command; the fork takes
the command's arguments, environment, folder and pipes, leaves the server's loop, runs the script as ``__main__`` and
ends as every interpreter does, with its threads, its atexit functions and its exit code. It becomes a child of the
test process, so waiting, signals and time limits are those of `subprocess`.

Not for tests about what a fresh interpreter does: imports and their time, missing packages, variables that libraries
read while they are imported. `tests/faults/test_forked.py` compares endings with those of fresh interpreters.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
import weakref
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
IMPORTED = "lightning.pytorch", "torch.utils.tensorboard", "tests.support.helpers", "attn_monitor.watch"
CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h: orphans below become children of this process

_one_at_a_time = threading.Lock()


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """As `subprocess.Popen`, for ``[sys.executable, …]``."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *options: Any) -> None:
        """In place of fork and exec; among the options are both ends of stdin, stdout and stderr, -1 for none."""
        if preexec_fn is not None or sys.platform != "linux":  # elsewhere no process can adopt the forks
            super()._execute_child(args, executable, preexec_fn, *options)  # type: ignore[misc]
            return
        _, _, cwd, env, _, _, _, *pipes = options
        executable, *words = map(str, args)
        assert executable == sys.executable, f"{executable} is not Python: use subprocess"
        p2cread, _, _, c2pwrite, _, errwrite = pipes[:6]
        request = json.dumps([words, str(cwd or os.getcwd()), dict(os.environ if env is None else env)]).encode()
        ends = [end if end >= 0 else standard for standard, end in enumerate((p2cread, c2pwrite, errwrite))]
        with _one_at_a_time:
            server = _server()
            ctypes.CDLL(None).prctl(CHILD_SUBREAPER, 1)
            socket.send_fds(server, [len(request).to_bytes(8, "big")], ends)
            server.sendall(request)
            self.pid = int.from_bytes(_read(server, 8), "big")  # sent when the fork is an orphan, and so ours
            ctypes.CDLL(None).prctl(CHILD_SUBREAPER, 0)
        self._child_created = True
        self._close_pipe_fds(*pipes[:6])  # type: ignore[attr-defined]


run = types.FunctionType(subprocess.run.__code__, {**vars(subprocess), "Popen": Popen})  # `subprocess.run` as it is
run.__kwdefaults__ = subprocess.run.__kwdefaults__


@cache
def _server() -> socket.socket:
    """The connection to this process's server, which ends when it is closed."""
    here, there = socket.socketpair()
    command = [sys.executable, "-m", "tests.support.forked", str(there.fileno())]
    # Threads of OpenBLAS, and of the pyarrow that older torchmetrics imports by way of transformers.
    alone = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    environment = {**os.environ, **alone, "PYTHONPATH": ""}
    null = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[there.fileno()], stdin=null, stdout=null)
    server.returncode = 0  # ends with this process: nothing waits for it
    there.close()
    atexit.register(here.close)
    return here


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (part := connection.recv(size - len(data))):
            raise EOFError("the other side has ended")
        data += part
    return bytes(data)


def _serve(connection: socket.socket) -> tuple[list[str], str, dict[str, str]]:
    """Fork for each request until the connection ends; returns in the forks alone, with what they are to run."""
    for name in IMPORTED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has no threads but its own: something was run"
    gc.freeze()  # what is imported stays in memory that all forks share
    while True:
        size, pipes, _, _ = socket.recv_fds(connection, 8, 3)
        if not size:
            sys.exit()
        words, cwd, environment = json.loads(_read(connection, int.from_bytes(size, "big")))
        readable, writable = os.pipe()
        if (between := os.fork()) == 0:
            if (child := os.fork()) == 0:
                for standard, end in enumerate(pipes):
                    os.dup2(end, standard)
                for end in (*pipes, readable, writable, connection.detach()):
                    os.close(end)
                return words, cwd, environment
            os.write(writable, child.to_bytes(8, "big"))
            os._exit(0)
        os.waitpid(between, 0)  # the fork is an orphan now, so the test process has it
        connection.sendall(os.read(readable, 8))
        for end in (*pipes, readable, writable):
            os.close(end)


def _become(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be an interpreter that was started with these words, up to the point where it runs its script."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["numpy"].random.seed()  # a fork would continue the server's numbers
    for finalizer in [*weakref.finalize._registry]:  # type: ignore[attr-defined]
        made = finalizer.peek()[0]
        if isinstance(made, tempfile.TemporaryDirectory):  # W&B's: the first fork to end would remove those of all
            finalizer.detach()
            made.__init__()  # type: ignore[misc]
    rank = int(environment.get("RANK", environment.get("LOCAL_RANK", 0)))
    sys.modules["lightning.pytorch.utilities"].rank_zero_only.rank = rank  # which it reads while it is imported
    importlib.invalidate_caches()
    while words[0] == "-W":
        warnings.simplefilter(words[1])  # type: ignore[arg-type]
        words = words[2:]
    kind, *rest = words
    first = {"-c": "", "-m": folder}.get(kind, str(Path(kind).resolve().parent))
    sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    else:
        sys.argv = words
        main.__file__ = str(Path(kind).absolute())
        exec(compile(Path(kind).read_bytes(), kind, "exec"), vars(main))


if __name__ == "__main__":
    _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))
