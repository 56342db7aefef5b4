"""Stems of small convolutions on small grids: tokens that each hold parts of four patches are read in their order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.capture.recheck_places import places_hold
from attn_monitor.capture.recorder import AttentionRecorder
from tests.hostile.test_wrong_places import Change, assert_map, changed, noise, unchanged
from tests.support.styles import DIM
from tests.support.tiers import sweep

Norm = Callable[[int], nn.Module]
NORMS: dict[str, Norm] = {"batch norm": nn.BatchNorm2d, "no norm": lambda _: nn.Identity()}


def with_stem(norm: Norm, act: type[nn.Module], tokens: Change = unchanged, seed: int = 0) -> nn.Module:
    """A ViT whose patch embedding is three convolutions of 3 × 3 pixels with stride 2."""
    model = changed(tokens=tokens, seed=seed)
    steps = [layer for c, d in ((3, 16), (16, 24)) for layer in (nn.Conv2d(c, d, 3, 2, 1), norm(d), act())]
    model.proj = nn.Sequential(*steps, nn.Conv2d(24, DIM, 3, 2, 1)).eval()
    return model


@pytest.mark.parametrize("seed", sweep([0, 1], quick=1))
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("norm", NORMS)
def test_a_stem_of_small_convolutions_on_a_small_grid(norm: str, act: type[nn.Module], seed: int) -> None:
    model, images = with_stem(NORMS[norm], act, seed=seed), noise(32, 48)
    layers = record_attention(model, images, layers="all")
    assert [found.layer for found in layers] == [0, 1, 2]
    for found in layers:
        assert found.places == "centres"
        assert_map(found, model, images, unchanged)
    sites = AttentionRecorder(model).sites(images)
    assert all(places_hold(model, images, lambda m, x: m(x), sites, number) for number in range(6))


def test_tokens_behind_a_stem_that_are_reversed_in_bright_images() -> None:
    def reversed_if_bright(x: Tensor) -> Tensor:
        bright = (x[:, 1:].mean((1, 2)) > x[:, 1:].mean())[:, None, None]
        return x.clone().masked_scatter(bright.expand_as(x), x.flip(1)[bright.expand_as(x)])

    for site in AttentionRecorder(with_stem(nn.BatchNorm2d, nn.ReLU, reversed_if_bright)).sites(noise(32, 48)):
        assert site.layout is None
