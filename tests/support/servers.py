"""Start a real server on loopback for the time of a test."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(
    command: Sequence[str], ready: str, folder: Path, *, text: bytes = b"", env: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a server until the block ends; entered once the address ``ready`` answers with ``text`` in it."""
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=env)
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(ready, timeout=2) as answer:
                    if text in answer.read():
                        break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.5)
        else:
            raise AssertionError(f"{ready} does not answer: {(folder / 'server.log').read_text()}")
        yield
    finally:
        server.terminate()
        server.wait(timeout=30)
