"""Orders in which hostile models put their tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.hostile_tape import Grid, Order


def static(change: Callable[[Tensor], Tensor]) -> Order:
    """The same order for all images."""
    return lambda x, t: change(t)


def on_grid(grid: Grid, change: Callable[[Tensor], Tensor]) -> Order:
    """Change (B, gh, gw, C), then read it row by row."""
    return lambda x, t: change(t.unflatten(1, grid)).flatten(1, 2)


def windows(grid: Grid, window: Grid) -> Order:
    """Window by window, row by row inside."""
    (gh, gw), (wh, ww) = grid, window
    return lambda x, t: t.unflatten(1, (gh // wh, wh, gw // ww, ww)).transpose(2, 3).flatten(1, 4)


def fixed(seed: int = 5) -> Order:
    """Shuffled once and for all."""
    return lambda x, t: t[:, torch.randperm(t.shape[1], generator=torch.Generator().manual_seed(seed))]


def by(score: Callable[[Tensor], Tensor]) -> Order:
    """Sorted by a score (B, N) of the tokens' content."""

    def order(x: Tensor, t: Tensor) -> Tensor:
        return t.gather(1, score(x).argsort(dim=1, stable=True)[..., None].expand_as(t))

    return order


def rolled_by(shift: Callable[[Tensor], Tensor]) -> Order:
    """Each image's tokens are rolled by their own number, (B,) of x."""

    def order(x: Tensor, t: Tensor) -> Tensor:
        index = (torch.arange(t.shape[1]) - shift(x)[:, None]) % t.shape[1]
        return t.gather(1, index[..., None].expand_as(t))

    return order


reverse, column_major = static(lambda t: t.flip(1)), lambda grid: on_grid(grid, lambda t: t.transpose(1, 2))


def mirror(grid: Grid) -> Order:
    """Each row from right to left."""
    return on_grid(grid, lambda t: t.flip(2))


def shift(by: int) -> Order:
    """Rolled along the sequence."""
    return static(lambda t: t.roll(by, 1))


def drawn(kind: str) -> Order:
    """Another order in each forward, or in each second one."""
    own, numpy, python = torch.Generator().manual_seed(3), np.random.default_rng(3), random.Random(3)
    calls = iter(range(10**9))
    draw: dict[str, Callable[[int], Any]] = {
        "torch": torch.randperm,
        "torch, own generator": lambda n: torch.randperm(n, generator=own),
        "torch, roll": lambda n: (torch.arange(n) + int(torch.randint(1, n, ()))) % n,
        "numpy": lambda n: np.random.permutation(n).tolist(),  # noqa: NPY002 - models do use the global state
        "numpy, own generator": lambda n: numpy.permutation(n).tolist(),
        "python": lambda n: random.sample(range(n), n),
        "python, own generator": lambda n: python.sample(range(n), n),
        "alternating": lambda n: list(range(n))[:: 1 if next(calls) % 2 else -1],
        "turning": lambda n: np.roll(np.arange(n), next(calls)).tolist(),
    }
    return static(lambda t: t[:, draw[kind](t.shape[1])])
