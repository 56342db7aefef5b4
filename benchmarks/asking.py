"""What it costs to ask a model for its places once, and what `record_attention` costs after that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.capture.site_cache import forget
from attn_monitor.capture.site_discovery import discover
from benchmarks.measure import Spread, take_turns
from benchmarks.peers import Size, no_grad, timm_vit, under_empty_mode


@dataclass(frozen=True)
class Asking:
    """Images that a plain ViT is asked, and times in plain forwards of one image.

    ``least`` is that of forwards on as many images under an empty dispatch mode, which see each operation too.
    """

    model: str
    images: int
    forwards: int
    first: Spread  # asking, once
    least: Spread
    again: Spread  # record_attention from the second call on


def measure_asking(size: Size, budget: float) -> Asking:
    """Of one model, on one image."""
    model, images = timm_vit(size), size.images()[:1]
    shown: list[int] = []

    def counted(m: nn.Module, x: Tensor) -> Any:
        shown.append(len(x))
        return m(x)

    discover(model, images, counted)
    ways: dict[str, Callable[[], Any]] = {
        "plain": no_grad(model, images),
        "again": lambda: record_attention(model, images),
    }
    again = take_turns(ways, budget=budget)

    def anew() -> None:
        forget(model)
        record_attention(model, images)

    alike = [under_empty_mode(model, images.expand(count, *images.shape[1:])) for count in shown]
    firsts = {"plain": ways["plain"], "first": anew, "empty": lambda: [run() for run in alike]}
    first = take_turns(firsts, budget=budget, most=5)
    ratios = (first.ratio("first", "plain"), first.ratio("empty", "plain"), again.ratio("again", "plain"))
    return Asking(size.name, sum(shown), len(shown), *ratios)
