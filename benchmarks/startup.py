"""What `import attn_monitor` adds to `import lightning`: time, and packages that nobody asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.measure import Spread

UNWANTED = ("wandb", "matplotlib", "timm", "transformers", "mlflow", "scipy", "pandas")
_PROGRAM = f"""
import json, sys, time
import lightning.pytorch
before, started = set(sys.modules), time.perf_counter()
import attn_monitor
seconds = time.perf_counter() - started
roots = {{m.split(".")[0] for m in set(sys.modules) - before}}
print(json.dumps([seconds, sorted(roots & set({UNWANTED!r}))]))
"""


@dataclass(frozen=True)
class Startup:
    """Milliseconds of the import, and which unwanted packages it loaded."""

    milliseconds: Spread
    unwanted: list[str]


def measure_startup(times: int) -> Startup:
    """In fresh processes; the first of several compiles the bytecode and does not count."""
    results = [_once() for _ in range(times)]
    results = results[1:] or results
    return Startup(Spread.of([1000 * seconds for seconds, _ in results]), results[0][1])


def _once() -> tuple[float, list[str]]:
    # Where bytecode is not written, every import compiles the source: not what an installed package does.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True, env=environment)
    seconds, unwanted = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), unwanted
