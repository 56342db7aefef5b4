"""Tokens whose fields overlap are ranked by their centres: two that hold the same cells have no rank of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.sites import Site
from attn_monitor.capture.token_places.decoding import is_warped
from tests.support.hostile_parts import Block, Net, Stem, conv
from tests.support.styles import DIM
from tests.support.tiers import sweep
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


def sites(stem: str, seed: int, *steps: nn.Module, rows: int = 4, columns: int = 6) -> list[Site]:
    """Of a model with steps before its two blocks."""
    torch.manual_seed(seed)
    model = enliven(Net(Stem("C*", embed=STEMS[stem](), grid=(rows, columns)), *steps, Block(), Block())).eval()
    return [*AttentionRecorder(model).sites(torch.randn(2, 3, 8 * rows, 8 * columns))]


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("seed", sweep(range(12), quick=2))
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


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("seed", range(2))
def test_tokens_that_share_the_cells_at_a_corner_are_not_ranked(stem: str, seed: int) -> None:
    assert [site.layout for site in sites(stem, seed, Share(1 + seed, 1 + seed + 7))] == [None, None]


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("grid", sweep([((2, 6),), ((2, 2),), ((1, 4),), ((6, 2),), ((2, 3),)], quick=2), ids=str)
def test_small_grids(grid: tuple[int, int], stem: str) -> None:
    rows, columns = grid
    alone = sites(stem, 1, rows=rows, columns=columns)
    assert [site.layout.order if site.layout else () for site in alone] == [tuple(range(rows * columns + 1))] * 2
    pairs = [(0, 1), (0, columns + 1)] if rows * columns > 4 else [(1, 2)] if rows == 1 else [(0, 1)]
    for first, second in pairs:
        shared = sites(stem, 1, Share(1 + first, 1 + second), rows=rows, columns=columns)
        assert [site.layout for site in shared] == [None, None], (first, second)


class Warped(nn.Module):
    """Patches of an image that is magnified in the middle: z becomes ±|z|^power, from -1 to 1."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power, self.conv = power, conv()

    def forward(self, x: Tensor) -> Tensor:
        height, width = (torch.linspace(-1, 1, n) for n in x.shape[-2:])
        height, width = (z.sign() * z.abs() ** self.power for z in (height, width))
        seen = torch.stack([width.expand(len(height), -1), height[:, None].expand(-1, len(width))], -1)
        out: Tensor = self.conv(F.grid_sample(x, seen.expand(len(x), -1, -1, -1), align_corners=True))
        return out


@pytest.mark.parametrize(("power", "rows"), [(2.0, 4), (2.0, 6), (1.6, 8), (1.2, 14)])
def test_a_warped_image_is_not_drawn_as_equal_cells(power: float, rows: int) -> None:
    torch.manual_seed(0)
    model = enliven(Net(Stem("C*", embed=Warped(power), grid=(rows, 6)), Block())).eval()
    (found,) = AttentionRecorder(model).sites(torch.randn(2, 3, 8 * rows, 48))
    assert found.layout is None


def test_spacing_of_centres() -> None:
    lines = torch.arange(8).double()
    shrunk, warped = 0.8 * lines + 0.7, 3.5 + 3.5 * ((lines - 3.5) / 3.5).abs() ** 1.6 * (lines - 3.5).sign()
    for columns, expected in ((lines, False), (lines - 0.5, False), (shrunk, False), (warped, True)):
        centre = torch.stack([torch.zeros(8).double(), columns])
        assert is_warped(centre, tuple(range(8)), (1, 8)) is expected
