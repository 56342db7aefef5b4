"""python -m benchmarks [--quick] [--out docs]: measure everything and write the document."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.asking import measure_asking
from benchmarks.long_run import measure_long_run
from benchmarks.measure import machine
from benchmarks.memory import measure_memory
from benchmarks.metrics_cost import measure_dense, measure_metrics, measure_watched_step
from benchmarks.peers import Size
from benchmarks.pictures import measure_pictures
from benchmarks.player import measure_player
from benchmarks.report import write_report
from benchmarks.results import Results
from benchmarks.scaling import measure_growth
from benchmarks.speed import LEFT_OUT, SETTINGS, SMALL, TINY, measure_speed
from benchmarks.startup import measure_startup
from benchmarks.suite import latest_runs
from benchmarks.training import measure_training

TRAINED = Size("ViT-Ti/16", width=192, depth=12, heads=3, pixels=224, batch=4)


def main() -> None:
    """Run it, telling on stderr what is being measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models, for developing: the figures say nothing")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of benchmarks.md and benchmarks.json")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started, load = time.perf_counter(), os.getloadavg()[0]
    results = Results(machine(), given.quick, {} if given.quick else LEFT_OUT)
    (_quick if given.quick else _full)(results)
    results.suite = latest_runs()
    results.minutes, results.loads = (time.perf_counter() - started) / 60, (load, os.getloadavg()[0])
    write_report(results, given.out)
    _tell(f"written to {given.out / 'benchmarks.md'} after {results.minutes:.1f} minutes")


def _quick(results: Results) -> None:
    tiny = TINY[0].size
    results.speed.extend(measure_speed(TINY))
    results.memory = measure_memory(tiny)
    results.pictures = measure_pictures(1, budget=0.1)
    results.player = measure_player(1, 3, 1)
    results.long_run = measure_long_run(3, 2)
    results.training = measure_training(replace(tiny, batch=8), steps=5, every=2)
    results.growth = measure_growth((4, 8), (1, 2), (1, 2), budget=0.05)
    results.metrics = measure_metrics(tiny, budget=0.1)
    results.watched_step = measure_watched_step(tiny, rounds=2)
    results.dense = measure_dense(tiny, rounds=2)
    results.startup = measure_startup(1)
    results.asking = measure_asking(tiny, budget=0.1)


def _full(results: Results) -> None:
    for table in measure_speed(SETTINGS):
        _tell(f"speed of {table.title}: {table.rounds} rounds")
        results.speed.append(table)
    _tell("memory")
    results.memory = measure_memory(replace(SMALL, pixels=960))
    _tell("pictures")
    results.pictures = measure_pictures(8, budget=15)
    _tell("player")
    results.player = measure_player(8, 50, 5)
    _tell("a long run's report")
    results.long_run = measure_long_run(1000, 12)
    _tell("training")
    results.training = measure_training(TRAINED, steps=36, every=5)
    _tell("growth")
    results.growth = measure_growth((14, 28, 42, 60, 84, 120), (1, 2, 4, 8, 12, 24), (1, 2, 4, 8, 16), budget=1.5)
    _tell("metrics")
    results.metrics = measure_metrics(replace(SMALL, batch=8), budget=10)
    results.watched_step = measure_watched_step(replace(SMALL, batch=8), rounds=8)
    results.dense = measure_dense(replace(SMALL, batch=8), rounds=8)
    _tell("start")
    results.startup = measure_startup(4)
    _tell("asking")
    results.asking = measure_asking(replace(SMALL, pixels=224, batch=1), budget=15)


def _tell(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
