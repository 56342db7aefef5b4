"""Check whether the centres of what tokens depend on are those of an order that is known beforehand.

Where fields are large, lines of cells near the borders of the image lie close together, and noise decides which of two
tokens comes first. Ranks are left to chance there. An order that something else suggests, such as row by row, needs
less: that nothing contradicts it, and that an exchange of two tokens would have been noticed.

Tokens lie in their order if and only if each comes after its neighbour on each axis: where n tokens have rising columns
among n columns, each is in its own. So neighbours alone are compared, by the distance of their lines and by the spread
of tokens around these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_monitor.capture.token_places.layout import STATIC, Places

_SEEN = 2.5  # least distance of two lines in standard deviations, below which an exchange could be noise
_CONTRADICTED = 3.5  # by so many standard deviations no two neighbours may lie nearer together than their lines
_MEAN_OFFSET = 0.4  # cells by which padding may move all centres: maps are laid over the whole image
_LARGEST_OFFSET = 1.5  # cells by which a line may lie beside its own, as at borders


def row_by_row(centre: Tensor, grid: Sequence[int]) -> Places | None:
    """Return tokens with an (axes, T) centre as the cells in their order; None unless there is one for each cell."""
    live: list[bool] = (~centre.isnan().any(0)).tolist()
    if sum(live) != math.prod(grid):
        return None
    cells = itertools.count()
    return tuple(next(cells) if alive else STATIC for alive in live)


def is_order(halves: Sequence[Tensor], places: Places, grid: Sequence[int]) -> bool:
    """Check that centres are those of an order, and precise enough to show an exchange of two tokens.

    Args:
        halves: (axes, T) centres in cells, one tensor for each half of the base images.
        places: The cell of each token, in the order to check; one token for each cell.
        grid: Number of cells on each axis.
    """
    if distance_of_lines(halves, places, grid) < _SEEN or not lies_over_image(halves, places, grid):
        return False
    for axis, (both, *parts) in _axes(halves, places, grid):
        offset = both.quantile(0.5, 1) - torch.arange(grid[axis])
        if float(offset.abs().max()) > _LARGEST_OFFSET:
            return False
        if any(_contradict(centre) for centre in (both, *parts)):
            return False
    return True


def lies_over_image(halves: Sequence[Tensor], places: Places, grid: Sequence[int]) -> bool:
    """Check that the centres of an order lie around the middle of the image, but for what padding moves all of them."""
    lines = [(both.quantile(0.5, 1), grid[axis]) for axis, (both, *_) in _axes(halves, places, grid)]
    return all(abs(float(line.mean()) - (count - 1) / 2) <= _MEAN_OFFSET for line, count in lines)


def may_be_order(halves: Sequence[Tensor], grid: Sequence[int], times: float) -> bool:
    """Return whether tokens could be seen to lie row by row with so many times as many images."""
    places = row_by_row(torch.stack(list(halves)).mean(0), grid)
    return places is not None and distance_of_lines(halves, places, grid) * math.sqrt(times) >= _SEEN


def distance_of_lines(halves: Sequence[Tensor], places: Places, grid: Sequence[int]) -> float:
    """Return the least distance of two neighbouring lines, in standard deviations between two of their tokens."""
    found = math.inf
    for _, (both, *_) in _axes(halves, places, grid):
        if bool(both.isnan().any()):
            return 0.0
        found = min(found, float(both.quantile(0.5, 1).diff().min()) / max(_spread(both), 1e-9))
    return found


def _axes(halves: Sequence[Tensor], places: Places, grid: Sequence[int]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield each axis of several lines with its (lines, tokens) centres: on average, then of each half."""
    tokens = sorted((token for token, place in enumerate(places) if place >= 0), key=lambda token: places[token])
    parts = [half[:, tokens].double().cpu().unflatten(1, tuple(grid)) for half in halves]
    for axis, count in enumerate(grid):
        if count > 1:
            own = (torch.stack(parts).mean(0), *parts)
            yield axis, tuple(part[axis].movedim(axis, 0).flatten(1) for part in own)


def _spread(centre: Tensor) -> float:
    """Return the standard deviation of the difference between two tokens of (lines, tokens), whatever a few of them."""
    beside = (centre - centre.quantile(0.5, 1, keepdim=True)).abs()
    return 1.4826 * math.sqrt(2 * centre.shape[1] / max(centre.shape[1] - 1, 1)) * float(beside.quantile(0.5))


def _contradict(centre: Tensor) -> bool:
    """Check whether a token of (lines, tokens) lies before its neighbour in the line before, and not by chance."""
    expected = centre.quantile(0.5, 1).diff()[:, None]
    apart = centre.diff(dim=0)
    before = (apart <= 0) & (apart < expected - _CONTRADICTED * _spread(centre))
    return bool((expected <= 0).any() or before.any())
