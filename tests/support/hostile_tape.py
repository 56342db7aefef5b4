"""The tape on which each attention of a hostile model writes down its own truth: its matrix, and its places.

The tape knows nothing of attn_monitor. A model is run once more in float64 while it is on; every attention notes the
matrix that multiplies V, and every part that moves tokens moves their places in the same way. While it is off, the
parts do nothing but what a model does.

A place is the number of the patch that a token holds (row-major on the true grid), `CLS`, ``register(i)``, or `NOWHERE`
for what is no part of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CLS, NOWHERE = -1, -99
Grid = tuple[int, int]
Order = Callable[[Tensor, Tensor], Tensor]
"""``order(x, t)``: t (B, N, C) in the order that the tokens x (B, N, D) ask for; most orders do not look at x."""


def register(i: int) -> int:
    """Place of the i-th token that is neither CLS nor patch."""
    return -2 - i


@dataclass
class Truth:
    """What one attention applied: (B, H, Q, K) float64, and the places of its queries (B, Q) and keys (B, K)."""

    module: nn.Module
    matrix: Tensor | None
    queries: Tensor
    keys: Tensor
    grid: Grid
    query_grid: Grid
    void: str  # why there is no true map, else ""
    values: Tensor | None = None


@dataclass
class Tape:
    """Places of the tokens on their way through the model, and the truths noted so far."""

    places: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    grid: Grid = (0, 0)
    void: str = ""
    truths: list[Truth] = field(default_factory=list)
    silent: bool = False  # no token learns of another: an attention's result is its own V


_running: list[Tape] = []


@contextmanager
def taped(silent: bool = False) -> Iterator[Tape]:
    """The tape is on."""
    _running.append(Tape(silent=silent))
    try:
        yield _running[-1]
    finally:
        _running.pop()


def tape() -> Tape | None:
    """The tape, while it is on."""
    return _running[-1] if _running else None


def moved(change: Callable[[Tensor], Tensor], grid: Grid | None = None, void: str = "") -> None:
    """Tokens have been moved: ``change`` does to (B, N, 1) places what was done to the tokens."""
    if (t := tape()) is not None:
        t.places = change(t.places[..., None])[..., 0]
        t.grid, t.void = grid or t.grid, void or t.void


def note(
    module: nn.Module,
    matrix: Tensor | Callable[[], Tensor] | None = None,
    v: Tensor | None = None,
    out: Tensor | None = None,
    *,
    queries: Callable[[Tensor], Tensor] = lambda p: p,
    keys: Callable[[Tensor], Tensor] = lambda p: p,
    grid: Grid | None = None,
    query_grid: Grid | None = None,
    void: str = "",
    alone: Tensor | None = None,
) -> Any:
    """Write down an attention and give back ``out``; ``queries`` and ``keys`` make their places from the tokens'.

    ``alone`` is the result if each query saw its own token only; V, if it is not given.
    """
    if (t := tape()) is not None:
        matrix = matrix() if callable(matrix) else matrix
        if matrix is not None and v is not None and out is not None:
            torch.testing.assert_close(matrix @ v, out)  # the author's own mistakes
        truth = Truth(
            module, matrix, queries(t.places), keys(t.places), grid or t.grid, query_grid or t.grid, void or t.void, v
        )
        t.truths.append(truth)
        if t.silent and out is not None:
            alone = v if alone is None else alone
            return alone if alone is not None and alone.shape == out.shape else torch.zeros_like(out)
    return out


def only_queries(change: Callable[[Tensor], Tensor]) -> None:
    """The attention noted last had only these of the tokens as queries."""
    if (t := tape()) is not None:
        t.truths[-1].queries = change(t.truths[-1].queries)


def nowhere(p: Tensor, count: int | None = None) -> Tensor:
    """(B, count) places of tokens that are no part of the image."""
    return torch.full((len(p), p.shape[1] if count is None else count), NOWHERE)


def cells(p: Tensor, grid: Grid) -> Tensor:
    """(B, gh·gw) places of tokens that stand row by row on a grid."""
    return torch.arange(grid[0] * grid[1]).expand(len(p), -1)


def arrange(spec: str, patches: Tensor, special: Callable[[str, int], Tensor]) -> Tensor:
    """Tokens as ``spec`` lists them: ``*`` all patches, ``<`` and ``>`` their halves, letters one other token each."""
    half = patches.shape[1] // 2
    parts = {"*": patches, "<": patches[:, :half], ">": patches[:, half:]}
    return torch.cat([parts[c] if c in parts else special(c, spec[:i].count(c)) for i, c in enumerate(spec)], 1)


def begin(spec: str, grid: Grid, batch: int, order: Order | None = None, void: str = "") -> None:
    """A new sequence begins: its places, as `arrange` puts them."""
    if (t := tape()) is not None:
        patches = torch.arange(grid[0] * grid[1])[None, :, None].expand(batch, -1, 1)
        patches = patches if order is None else order(patches, patches)
        others = {"R": lambda i: register(i), "G": lambda i: register(50 + i)}

        def special(letter: str, i: int) -> Tensor:
            return torch.full((batch, 1, 1), others[letter](i) if letter in others else CLS)

        t.places, t.grid, t.void = arrange(spec, patches, special)[..., 0], grid, void
