"""Paired timing, peak memory from the allocator's own log, and what the machine is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "transformers", "vit-pytorch", "matplotlib", "lightning", "numpy", "pillow")


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some values; the quartiles of a single one are itself."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Rounds:
    """Times of several functions that were run in turn, in one process, so that what slows one slows all.

    The order is turned round every other time. Only ratios between functions of the same round are ever reported.
    """

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = dict(seconds)
        self.count = len(next(iter(self.seconds.values())))

    def ratio(self, name: str, to: str) -> Spread:
        """How many times as long as another function, round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])

    def quotient(self, one: tuple[str, str], other: tuple[str, str]) -> Spread:
        """Ratio of two ratios, round by round."""
        rows = zip(*(self.seconds[name] for name in (*one, *other)), strict=True)
        return Spread.of([(a / b) / (c / d) for a, b, c, d in rows])

    def milliseconds(self, name: str) -> float:
        """Median time, to tell the order of magnitude."""
        return 1000 * median(self.seconds[name])


def take_turns(
    functions: Mapping[str, Callable[[], Any]],
    *,
    budget: float,
    least: int = 3,
    most: int = 25,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Run all functions once unmeasured, and then in rounds until ``budget`` seconds are spent."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    begun, done = time.perf_counter(), 0
    while done < least or (done < most and time.perf_counter() - begun < budget):
        for name in functions if done % 2 == 0 else reversed(list(functions)):
            started = clock()
            functions[name]()
            seconds[name].append(clock() - started)
        done += 1
    return Rounds(seconds)


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that tensors took at any time during a call, over what there was before: from the allocator's log."""
    from torch.profiler import ProfilerActivity, profile

    function()  # caches that are filled once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        kept = function()
    results = log.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    del kept
    taken = highest = 0
    for _, change in changes:
        taken += change
        highest = max(highest, taken)
    return highest


def available_bytes() -> int:
    """Memory that could be taken now; half of all memory where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            facts = dict(line.split(":") for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (FileNotFoundError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def machine() -> dict[str, Any]:
    """Processor, cores, threads and versions; nothing that names this very machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (FileNotFoundError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
