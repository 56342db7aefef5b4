"""The report of a long run: how long it takes to draw an archive, and how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.player import write_run

# From a small process of its own: until it runs its program, a child counts the memory of its parent.
_MEASURED = """
import json, os, subprocess, sys, time
started = time.perf_counter()
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid, 0)
print(json.dumps([time.perf_counter() - started, usage.ru_maxrss * 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


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
        done = subprocess.run([sys.executable, "-c", _MEASURED, *command], capture_output=True, text=True, check=True)
        seconds, peak = json.loads(done.stdout)
        size = sum(file.stat().st_size for file in archive.iterdir())
        return LongRun(steps, layers, size, page.stat().st_size, seconds, peak)
