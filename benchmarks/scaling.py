"""How the capture's own cost grows: with tokens, layers and images.

What it adds to a forward is far less than how much one forward differs from the next, once attention over thousands
of tokens takes a second. So both are run on a model of nothing but attention, whose kernel is left out of both runs:
what remains is the reading.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import take_turns
from benchmarks.peers import no_grad, recorder

HEADS, WIDTH, PATCH, LAYERS, SIDE = 3, 96, 4, 4, 28


class _Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, T, D)
        out: Tensor = nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return out


class OnlyAttention(nn.Module):
    """A patch embedding, a CLS token, and layers that are attention and nothing else."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layers = nn.ModuleList(_Attend() for _ in range(layers))

    def forward(self, images: Tensor) -> Tensor:
        """Tokens after the last layer, (B, T, C)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        tokens: Tensor = x
        return tokens


class _WithoutKernel(TorchDispatchMode):
    """Gives a copy of V as the result of fused attention: what remains of its cost is the writing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_scaled_dot_product_" in str(func):
            v = args[2].clone(memory_format=torch.contiguous_format)  # a result owns its memory, as a kernel's does
            return v, v[..., 0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Growth:
    """Own cost in milliseconds at several sizes, and the straight line through it."""

    of: str
    sizes: list[int]
    milliseconds: list[float]
    fixed: float
    slope: float
    r_squared: float

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _own_cost(layers: int, images: int, side: int, budget: float) -> float:
    model = OnlyAttention(layers).eval()
    x = torch.randn(images, 1, side * PATCH, side * PATCH, generator=torch.Generator().manual_seed(0))
    captured, plain = recorder(model, x, "all"), no_grad(model, x)

    def without_kernel(run: Callable[[], Any]) -> Callable[[], None]:
        def inner() -> None:
            with _WithoutKernel():  # type: ignore[no-untyped-call]
                run()

        return inner

    turns = {"plain": without_kernel(plain), "ours": without_kernel(captured)}
    seconds = take_turns(turns, budget=budget, least=9, most=60, clock=time.process_time).seconds
    return 1000 * median(ours - plain for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True))


def _line(of: str, sizes: Sequence[int], costs: Sequence[float]) -> Growth:
    slope, fixed = np.polyfit(sizes, costs, 1)
    residual = np.asarray(costs) - (fixed + slope * np.asarray(sizes))
    r_squared = 1 - float((residual**2).sum() / ((np.asarray(costs) - np.mean(costs)) ** 2).sum())
    return Growth(of, list(sizes), [round(c, 3) for c in costs], float(fixed), float(slope), r_squared)


def measure_growth(sides: Sequence[int], layers: Sequence[int], images: Sequence[int], budget: float) -> list[Growth]:
    """Own cost against tokens, layers and images, the others as they are: a line through each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that processor time is work, and not threads that wait for each other
    try:
        return [
            _line("tokens", [s * s for s in sides], [_own_cost(LAYERS, 1, s, budget) for s in sides]),
            _line("layers", layers, [_own_cost(n, 1, SIDE, budget) for n in layers]),
            _line("images", images, [_own_cost(LAYERS, n, SIDE, budget) for n in images]),
        ]
    finally:
        torch.set_num_threads(threads)
