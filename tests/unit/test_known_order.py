"""Centres of large fields: a known order holds where ranks are chance, and no exchange of tokens is missed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_monitor.capture.token_places.decoding import places_by_centre
from attn_monitor.capture.token_places.known_order import is_order, row_by_row
from attn_monitor.grid import Grid

GRID = (10, 8)
CELLS = tuple(range(80))


def halves(noise: float, border: float = 0.5, offset: float = 0.0, seed: int = 0) -> list[Tensor]:
    """Two measurements of the (2, 80) centres of tokens row by row, with lines nearer together at the border."""
    lines = Grid(GRID).lines.double()
    ends = torch.tensor(GRID).double()[:, None] - 1
    inwards = (1 - border) * ((lines == 0).double() - (lines == ends).double())
    draw = torch.Generator().manual_seed(seed)
    return [lines + inwards + offset + noise * 2**0.5 * torch.randn(2, 80, generator=draw) for _ in range(2)]


def test_rows_hold_where_ranks_are_chance() -> None:
    ranked = held = 0
    for seed in range(40):
        one, other = halves(0.1, seed=seed)
        places = places_by_centre(one, GRID)
        ranked += places is not None and places == places_by_centre(other, GRID)
        held += is_order([one, other], CELLS, GRID)
    assert ranked <= 8
    assert held >= 34


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("border", [0.2, 0.5, 1.0])
def test_an_exchange_of_two_tokens_is_noticed(noise: float, border: float) -> None:
    missed = 0
    for seed in range(60):
        one = 8 * (seed % 10) + 7 * (seed % 2)  # at the left or the right border
        beside = -1 if seed % 2 else 1
        other = one + beside if seed % 3 else (one + 8) % 80
        order = list(CELLS)
        order[one], order[other] = order[other], order[one]
        missed += is_order([half[:, order] for half in halves(noise, border, seed=seed)], CELLS, GRID)
    assert missed <= 1


@pytest.mark.parametrize("offset", [0.6, -0.6, 1.0])
def test_grids_beside_the_image_are_none(offset: float) -> None:
    assert is_order(halves(0.05), CELLS, GRID)
    assert not is_order(halves(0.05, offset=offset), CELLS, GRID)


def test_other_grids_and_orders_are_none() -> None:
    parts = halves(0.05)
    assert not is_order(parts, CELLS, (8, 10))
    assert not is_order(parts, CELLS, (20, 4))
    assert not is_order([part.flip(1) for part in parts], CELLS, GRID)
    assert not is_order([parts[0], parts[1].flip(1)], CELLS, GRID)
    assert not is_order([part.roll(1, 1) for part in parts], CELLS, GRID)
    assert not is_order([part[:, torch.randperm(80)] for part in parts], CELLS, GRID)


def test_a_token_without_a_centre() -> None:
    centre = halves(0.05)[0]
    beside = torch.cat([torch.full((2, 1), torch.nan), centre], 1)
    assert row_by_row(beside, GRID) == (-1, *CELLS)
    assert row_by_row(centre[:, 1:], GRID) is None
