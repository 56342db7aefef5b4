"""An order of tokens whose fields are larger than cells is known by what shifts with the image."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.capture.token_places.shifted_images import _fit
from tests.support import families
from tests.support.families import _registered
from tests.support.oracle import attention_matrices
from tests.support.tiers import sweep
from tests.support.zoo import enliven


def xcit() -> nn.Module:
    return _registered("xcit_nano_12_p8_224", img_size=64, embed_dim=32, depth=4, num_heads=4)()


@pytest.mark.parametrize(
    ("build", "read", "seed"),
    sweep(
        [(xcit, (4, 5), 1), (families._caformer, (0, 1), 1), (xcit, (4, 5), 0), (families._caformer, (0,), 0)], quick=1
    ),
)
def test_with_all_weights_redrawn(build: Callable[[], nn.Module], read: tuple[int, ...], seed: int) -> None:
    """XCiT's class attention and CAFormer's stages behind convolutions: their tokens are row by row by their code."""
    torch.manual_seed(seed)
    model, images = enliven(build()).eval(), torch.randn(2, 3, 64, 64)
    sites = AttentionRecorder(model, query="mean").sites(images)
    matrices = attention_matrices(model, images, default_forward)[-len(sites) :]
    for index in read:
        layout = sites[index].layout
        assert layout is not None, sites[index].refusal
        assert list(layout.patches) == list(range(len(layout.prefix), sites[index].keys))
        (seen,) = record_attention(model, images, layers=index, query="mean")
        expected = matrices[index].mean(2)
        assert float((seen.rows - expected).abs().max()) * sites[index].keys <= 2e-3


def field(channels: int, seed: int) -> Tensor:
    """A kernel of 5 × 5 cells, as several convolutions make."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, channels, 5, 5, generator=generator)


def changes(grid: tuple[int, int], seed: int, channels: int = 24) -> Tensor:
    """What a convolution with zero padding makes of noise, and of the same noise shifted by one row and one column."""
    noise = torch.randn(1, channels, *grid, generator=torch.Generator().manual_seed(100 + seed))
    noise[..., -1] = 0
    noise[..., -1, :] *= grid[0] == 1
    shifted = [
        noise,
        *(torch.nn.functional.pad(noise, pad)[..., : grid[0], : grid[1]] for pad in ((0, 0, 1, 0), (1, 0))),
    ]
    return F.conv2d(torch.cat(shifted), field(channels, seed), padding=2).flatten(2).mT


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (1, 6), (8, 8)])
def test_every_exchange_of_two_tokens_is_seen(grid: tuple[int, int]) -> None:
    cells = grid[0] * grid[1]
    seen, order = [changes(grid, seed) for seed in range(2)], tuple(range(cells))
    assert _fit(seen, 2, order, grid) == 1
    for one, other in itertools.islice(itertools.combinations(range(cells), 2), 100):
        exchanged = list(order)
        exchanged[one], exchanged[other] = other, one
        assert _fit(seen, 2, tuple(exchanged), grid) < 1
        apart = [seen[0], seen[1][:, exchanged]]  # exchanged in one of the two images alone
        assert _fit(apart, 2, order, grid) < 1


@pytest.mark.parametrize(
    "moved",
    [
        lambda x: x.roll(1, 1),
        lambda x: x.roll(3, 0),
        lambda x: x.flip(0),
        lambda x: x.flip(1),
        lambda x: x.mT,
        lambda x: x.roll(1),
        lambda x: torch.cat([x[1:2], x[:1], x[2:]]),
        lambda x: torch.where(torch.arange(8)[:, None] % 2 == 1, x.flip(1), x),
        lambda x: x.unflatten(0, (2, 4)).unflatten(2, (2, 4)).transpose(1, 2).reshape(8, 8),
    ],
    ids=["columns", "rows", "upside down", "mirrored", "transposed", "one on", "first rows", "serpentine", "windows"],
)  # fmt: skip
def test_no_other_order_shifts(moved: Callable[[Tensor], Tensor]) -> None:
    seen = [changes((8, 8), seed)[:, moved(torch.arange(64).view(8, 8)).flatten()] for seed in range(2)]
    assert _fit(seen, 2, tuple(range(64)), (8, 8)) < 1
