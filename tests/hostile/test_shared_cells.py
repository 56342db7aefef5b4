"""Tokens whose fields overlap are ranked by their centres: two that hold the same cells have no rank of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.sites import Site
from tests.support.hostile_parts import Block, Net, Stem, conv
from tests.support.styles import DIM
from tests.support.zoo import enliven

STEMS: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.Sequential(conv(), nn.GroupNorm(4, DIM)),
    "overlapping": lambda: conv(12, 8, 2),
}


class Share(nn.Module):
    """Two tokens each become a linear map of their sum: both hold the same two cells."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.pair, self.maps = (first, second), nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = list(x.unbind(1))
        both = tokens[self.pair[0]] + tokens[self.pair[1]]
        for token, made_of in zip(self.pair, self.maps, strict=True):
            tokens[token] = made_of(both)
        return torch.stack(tokens, 1)


def sites(stem: str, seed: int, *steps: nn.Module, rows: int = 4) -> list[Site]:
    """Of a model on a grid of six columns, with steps before its two blocks."""
    torch.manual_seed(seed)
    model = enliven(Net(Stem("C*", embed=STEMS[stem](), grid=(rows, 6)), *steps, Block(), Block())).eval()
    return [*AttentionRecorder(model).sites(torch.randn(2, 3, 8 * rows, 48))]


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("seed", range(12))
def test_tokens_that_share_their_cells_are_not_ranked(stem: str, seed: int) -> None:
    cell = 6 * (seed % 4) + seed % 5
    found = sites(stem, seed, Share(1 + cell, 2 + cell))
    assert len(found) == 2
    assert all("two of its keys change about as much with one another's patch" in s.places.reason for s in found)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_tokens_that_share_the_cells_of_a_column_are_not_ranked(stem: str, seed: int) -> None:
    found = sites(stem, seed, Share(1 + 8, 1 + 14))
    assert [site.layout for site in found] == [None, None]


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_whose_fields_overlap_are_ranked(stem: str, seed: int) -> None:
    for site in sites(stem, seed):
        assert site.layout is not None, site.places.reason
        assert (site.layout.evidence, site.layout.order) == ("centres", tuple(range(25)))


@pytest.mark.parametrize("seed", range(2))
def test_grids_of_two_rows(seed: int) -> None:
    alone = sites("GroupNorm", seed, rows=2)
    assert [site.layout.order if site.layout else () for site in alone] == [tuple(range(13))] * 2
    assert [site.layout for site in sites("GroupNorm", seed, Share(2 + seed, 3 + seed), rows=2)] == [None, None]
