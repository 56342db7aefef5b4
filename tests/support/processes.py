"""Start a test's function in several processes, as torchrun would, and collect what each of them returned."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.support import forked
from tests.support.forked import ROOT


def launch(
    work: str, folder: Path, *, processes: int, seconds: float = 300, succeed: bool = True
) -> list[dict[str, Any]]:
    """What the function ``module:name`` returned in each process; all must end in time, and without an error.

    With ``succeed=False`` each must fail instead, and there is nothing to return.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running = [_start(work, folder, rank, processes, port) for rank in range(processes)]
    deadline = time.monotonic() + seconds
    try:
        for process in running:
            process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        said = "\n".join(_said(folder, rank) for rank in range(processes))
        raise AssertionError(f"{work} hangs in {processes} processes:\n{said}") from None
    finally:
        for process in running:
            process.kill()
            process.wait()
    for rank, process in enumerate(running):
        said = "\n".join(_said(folder, other) for other in range(processes))
        assert (process.returncode == 0) is succeed, f"{work}, process {rank} of {processes}:\n{said}"
    if not succeed:
        return []
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def free_port() -> int:
    """A loopback port that nothing listens on, nor is given by chance.

    It lies below those that systems hand out: a process takes seconds to come to listen, and every connection that
    another test opens meanwhile is handed one of these.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _start(work: str, folder: Path, rank: int, processes: int, port: int) -> subprocess.Popen[bytes]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
    environment = {**os.environ, **{name: str(value) for name, value in {**place, **where}.items()}}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (folder / f"{rank}.txt").open("wb") as output:
        return forked.Popen(
            [sys.executable, "-m", "tests.support.processes", work, str(folder)],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _said(folder: Path, rank: int) -> str:
    return f"--- process {rank}\n" + (folder / f"{rank}.txt").read_text()[-5000:]


def main() -> None:
    """Run one function here and keep what it returns."""
    import faulthandler
    import importlib

    faulthandler.dump_traceback_later(200, exit=False)
    work, folder = sys.argv[1], Path(sys.argv[2])
    module, _, name = work.partition(":")
    result = getattr(importlib.import_module(module), name)(folder)
    torch.save(result, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
