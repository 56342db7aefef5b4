"""The report of a long run: how long it takes to draw an archive, and how much memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.player import write_run


@dataclass(frozen=True)
class LongRun:
    """An archive of ``steps`` snapshots of ``layers`` layers, and its report drawn by the command."""

    steps: int
    layers: int
    archive_bytes: int
    report_bytes: int
    seconds: float
    peak_bytes: int


def measure_long_run(steps: int, layers: int) -> LongRun:
    """Write an archive, and draw it with `attn-monitor report`."""
    with tempfile.TemporaryDirectory() as folder:
        archive, page = Path(folder) / "attn_monitor", Path(folder) / "report.html"
        archive.mkdir()
        write_run(archive, 8, steps, layers=layers)
        command = [sys.executable, "-m", "attn_monitor", "report", folder, "--out", str(page)]
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            raise RuntimeError(f"{' '.join(command)} ended with status {status}")
        size = sum(file.stat().st_size for file in archive.iterdir())
        return LongRun(steps, layers, size, page.stat().st_size, seconds, usage.ru_maxrss * 1024)
