"""python -m benchmarks.gpu: how many plain forwards a recording takes on a GPU, and its peak memory; printed only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import take_turns
from benchmarks.peers import no_grad, recorder, timm_vit
from benchmarks.speed import BASE, SMALL


def main() -> None:
    """Run it; without a CUDA device, say so."""
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ratios to a plain forward: median (quartiles)")
    for size in (SMALL, replace(SMALL, batch=8), replace(SMALL, pixels=960), BASE, replace(BASE, batch=64)):
        for dtype in (torch.float32, torch.bfloat16):
            model, images = timm_vit(size).to("cuda", dtype), size.images().to("cuda", dtype)
            runs: dict[str, Callable[[], Any]] = {
                "plain": no_grad(model, images),
                "last": recorder(model, images, -1),
                "last, verified": recorder(model, images, -1, True),
                "all": recorder(model, images, "all"),
                "all, verified": recorder(model, images, "all", True),
            }
            rounds = take_turns({name: _finished(run) for name, run in runs.items()}, budget=5)
            print(
                f"{size.name} at {size.pixels} px, batch {size.batch}, {dtype}: {rounds.milliseconds('plain'):.2f} ms"
            )
            for name, run in runs.items():
                ratio = "" if name == "plain" else f"{rounds.ratio(name, 'plain')}, "
                print(f"  {name}: {ratio}{_peak(run) / 2**20:.0f} MB")


def _finished(run: Callable[[], Any]) -> Callable[[], None]:
    def finished() -> None:
        run()
        torch.cuda.synchronize()

    return finished


def _peak(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
