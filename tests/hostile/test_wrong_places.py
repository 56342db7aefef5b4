"""No map at a wrong place: images that are mirrored or turned, tokens that are copies or mixtures of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.attention import LayerAttention
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.grid import GridGeometry
from tests.hostile.test_patches_in_pixels import CutOut
from tests.support.oracle import attention_matrices
from tests.support.styles import DIM, PATCH, Block, MemEffAttention
from tests.support.tiers import sweep
from tests.support.zoo import enliven

GRID = (4, 6)
Change = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    return x


class Changed(nn.Module):
    """A ViT on a 4 × 6 grid that changes its images, and its tokens (B, 25, D) before the blocks."""

    def __init__(self, pixels: Change = unchanged, tokens: Change = unchanged, linear: bool = False) -> None:
        super().__init__()
        self.pixels, self.tokens = pixels, tokens
        self.proj = CutOut() if linear else nn.Conv2d(3, DIM, PATCH, PATCH)
        self.pos_embed = nn.Parameter(0.3 * torch.randn(1, GRID[0] * GRID[1], DIM))
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.blocks = nn.ModuleList(Block(MemEffAttention()) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(self.pixels(images)).flatten(2).transpose(1, 2) + self.pos_embed
        x = self.tokens(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def changed(
    pixels: Change = unchanged, tokens: Change = unchanged, *, linear: bool = False, seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    return enliven(Changed(pixels, tokens, linear)).eval()


def noise(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))


def assert_map(found: LayerAttention, model: nn.Module, images: Tensor, turn: Change) -> None:
    """The CLS query's row in the model's own order, brought to the image's by ``turn``."""
    matrix = attention_matrices(model, images, lambda m, x: m(x))[found.layer]
    expected = turn(matrix[:, :, 0, 1:].unflatten(-1, GRID))
    torch.testing.assert_close(found.maps.double(), expected.double(), rtol=1e-3, atol=1e-4)


# What is done to the image, its size, how the grid of tokens comes to lie in it, and the first pixel and cells' size.
MIRRORED: dict[str, tuple[Change, tuple[int, int], Change, GridGeometry]] = {
    "mirrored, padded right more": (
        lambda x: F.pad(x.flip(-1), (1, 7)), (32, 40), lambda m: m.flip(-1), GridGeometry((0, -7), (8, 8)),
    ),
    "mirrored, padded left more": (
        lambda x: F.pad(x.flip(-1), (3, 1)), (32, 44), lambda m: m.flip(-1), GridGeometry((0, -1), (8, 8)),
    ),
    "upside down, padded": (
        lambda x: F.pad(x.flip(-2), (0, 0, 6, 1)), (25, 48), lambda m: m.flip(-2), GridGeometry((-1, 0), (8, 8)),
    ),
    "mirrored, cropped": (
        lambda x: x.flip(-1)[:, :, :32, :48], (35, 53), lambda m: m.flip(-1), GridGeometry((0, 5), (8, 8)),
    ),
    "mirrored, the rest dropped": (
        lambda x: x.flip(-1).flip(-2), (35, 53), lambda m: m.flip(-1).flip(-2), GridGeometry((3, 5), (8, 8)),
    ),
    "copied, the rest dropped": (
        lambda x: x.clone(), (35, 53), lambda m: m, GridGeometry((0, 0), (8, 8)),
    ),
    "mirrored, padded, resized": (
        lambda x: F.interpolate(F.pad(x.flip(-1), (12, 4)), (32, 48), mode="bilinear", antialias=True), (64, 80),
        lambda m: m.flip(-1), GridGeometry((0, -4), (16, 16)),
    ),
    "turned": (
        lambda x: torch.rot90(x, 1, (2, 3)), (48, 32), lambda m: torch.rot90(m, -1, (2, 3)),
        GridGeometry((0, 0), (8, 8)),
    ),
    "transposed, padded": (
        lambda x: F.pad(x.mT, (5, 0)), (43, 32), lambda m: m.mT, GridGeometry((-5, 0), (8, 8)),
    ),
    "turned, cropped": (
        lambda x: torch.rot90(x, -1, (2, 3))[:, :, :32, :48], (53, 35), lambda m: torch.rot90(m, 1, (2, 3)),
        GridGeometry((5, 0), (8, 8)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("linear", sweep([False, True], quick=1), ids=["convolution", "linear"])
@pytest.mark.parametrize("name", MIRRORED)
def test_images_that_are_mirrored_or_turned(name: str, linear: bool) -> None:
    pixels, size, turn, geometry = MIRRORED[name]
    model, images = changed(pixels, linear=linear), noise(*size)
    (found,) = record_attention(model, images)
    assert_map(found, model, images, turn)
    lies = found.grid.placed(size)
    assert (*lies.origin, *lies.cell) == pytest.approx((*geometry.origin, *geometry.cell), abs=1.01 if linear else 0.51)


REASONS = (
    "the order of its keys is not known",
    "no grid of patches",
    "two of its keys change about as much with one another's patch",
    "may not be in one order",
    "the centres of what its keys hold lie closer together in the middle",
)


def mixed_with(share: float, by: int) -> Change:
    """Tokens that are made of their own patch, and of a ``share`` of the one that stands some places before."""
    return lambda x: torch.cat([x[:, :1], (1 - share) * x[:, 1:] + share * x[:, 1:].roll(by, 1)], 1)


@pytest.mark.parametrize("share", sweep([0.1, 0.4, 0.2, 0.3], quick=1))
@pytest.mark.parametrize("by", [1, -1, 6])
def test_tokens_that_hold_some_of_another_patch(share: float, by: int) -> None:
    """They lie where most of what they hold is, in every layer, or are refused."""
    for seed in range(3):
        model, images = changed(tokens=mixed_with(share, by), seed=seed), noise(32, 48)
        for site in AttentionRecorder(model).sites(images):
            if site.layout is None:
                assert any(words in site.places.reason for words in REASONS), site.places.reason
            else:
                assert site.layout.patches == tuple(range(1, 25)), f"layer {site.index}"


@pytest.mark.parametrize(("cell", "like"), [(9, 8), (9, 15), (0, 1)])
def test_a_token_that_is_a_copy_of_another(cell: int, like: int) -> None:
    order = [like + 1 if t == cell + 1 else t for t in range(25)]
    for site in AttentionRecorder(changed(tokens=lambda x: x[:, order])).sites(noise(32, 48)):
        assert site.layout is None
        assert "1 of them belongs to two keys or more, and 1 to no key alone" in site.places.reason


def test_a_part_of_the_patches() -> None:
    kept = [0, *(1 + 6 * r + c for r in (1, 2) for c in (2, 3, 4))]
    for site in AttentionRecorder(changed(tokens=lambda x: x[:, kept])).sites(noise(32, 48)):
        assert site.layout is None
        assert "of the 4 × 6 cells of a grid that was tried, 6 have a key of their own" in site.places.reason


def test_images_that_are_rounded() -> None:
    """Changes of less than a grey level leave no trace; stronger ones are asked about."""
    model = changed(lambda x: ((x * 0.25 + 0.45) * 255).clamp(0, 255).to(torch.uint8).to(x.dtype) / 255)
    (found,) = record_attention(model, noise(32, 48))
    assert found.places == "exact"
    assert_map(found, model, noise(32, 48), unchanged)
