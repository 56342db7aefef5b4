"""Models that scale, clip or round their images inside are read on images of their own range, and true by place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from skimage import data, transform
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.capture.token_places.ablated_model import AblatedModel
from attn_monitor.capture.token_places.synthetic_images import noise_images
from tests.support.helpers import tiny_vit
from tests.support.oracle import attention_matrices

SIZE = (32, 32)


def photographs() -> Tensor:
    """Two photographs, floats in 0 to 1 with black and white pixels in them."""
    read = [transform.resize(getattr(data, name)(), SIZE, anti_aliasing=True) for name in ("astronaut", "coffee")]
    images = torch.stack([torch.tensor(image).float().movedim(-1, 0) for image in read])
    return ((images - 0.5) * 1.4 + 0.5).clamp(0, 1)


def _over(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _min_max(x: Tensor) -> Tensor:
    low, high = x.amin(_over(x), keepdim=True), x.amax(_over(x), keepdim=True)
    return (x - low) / (high - low + 1e-6)


def _z_score(x: Tensor) -> Tensor:
    return (x - x.mean(_over(x), keepdim=True)) / (x.std(_over(x), keepdim=True) + 1e-6)


def _only_0_to_1(x: Tensor) -> Tensor:
    if float(x.min()) < 0 or float(x.max()) > 1:
        raise ValueError(f"expected values from 0 to 1, received {float(x.min())} to {float(x.max())}")
    return (x - 0.45) / 0.25


class Inside(nn.Module):
    """A ViT behind a step of its own."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.vit, self.step = tiny_vit(), step
        generator = torch.Generator().manual_seed(0)
        for parameter in self.vit.parameters():  # far from uniform attention
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and len(parameter) > 1 else 0.4
            parameter.data = parameter.data * (scale == 0.4) + 1.2 * scale * drawn

    def forward(self, x: Tensor) -> Any:
        return self.vit(self.step(x))


# The images, and what the model does to them.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "bytes": (lambda p: (p * 255).round(), lambda x: (x - 120) / 58),
    "bytes over 255": (lambda p: p * 255, lambda x: x / 255),
    "reflectances": (lambda p: p * 6000 + 500, lambda x: x / 10_000),
    "standardised reflectances": (lambda p: p * 3000 + 300, lambda x: (x - 1500) / 900),
    "clipped Hounsfield units": (lambda p: p * 1500 - 900, lambda x: (x.clamp(-1000, 1000) + 1000) / 2000),
    "soft tissue of a whole scan": (lambda p: p * 2500 - 1000, lambda x: (x.clamp(-160, 240) + 160) / 400),
    "clipped to 0 and 1": (lambda p: p, lambda x: (x.clamp(0, 1) - 0.45) / 0.25),
    "refused outside of 0 to 1": (lambda p: p, _only_0_to_1),
    "least and most of each image": (lambda p: p * 255, _min_max),
    "standardised by each image": (lambda p: p * 255, _z_score),
    "rounded to bytes": (lambda p: (p * 255).round(), lambda x: x.round().clamp(0, 255) / 255),
    "logarithms": (lambda p: p * 3000, lambda x: torch.log1p(x.clamp(min=0))),
    "roots of weak signals": (lambda p: p * 1e-3, lambda x: 30 * x.clamp(min=0).sqrt()),
    "magnified": (lambda p: 1000 + p / 10, lambda x: (x - 1000) * 10),
}
# Not proportional to small changes of a photograph, or not of one patch alone.
ASK_MORE = {
    "rounded to bytes",
    "logarithms",
    "roots of weak signals",
    "least and most of each image",
    "standardised by each image",
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_scales_its_images_is_read(case: str) -> None:
    make, step = CASES[case]
    images, model, asked = make(photographs()), Inside(step).eval(), []
    original = AblatedModel.__call__

    def counted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(x))
        return original(self, x, *args, **kwargs)

    with mock.patch.object(AblatedModel, "__call__", counted):
        layers = record_attention(model, images, layers="all")
    wanted = attention_matrices(model, images, lambda m, x: m(x))
    assert len(layers) == len(wanted)
    for layer, matrix in zip(layers, wanted, strict=True):
        assert layer.grid == (4, 4)
        expected = matrix[:, :, 0, 1:].unflatten(-1, (4, 4))
        assert float((layer.maps.double() - expected).abs().max()) * 16 < 1e-3
        assert layer.places == ("centres" if step is _z_score else "exact")
    assert sum(asked) <= (60 if case in ASK_MORE else 18)


def test_noise_has_the_values_of_each_channel() -> None:
    scales = torch.tensor([1.0, 50.0, 10_000.0])[:, None, None]
    images = photographs() * scales - torch.tensor([0.0, 10.0, 5000.0])[:, None, None]
    noise = noise_images(images, 4)
    for channel in range(3):
        own = images[:, channel]
        low, high = own.aminmax()
        assert low <= noise[:, channel].min() <= low + 0.02 * (high - low)
        assert high >= noise[:, channel].max() >= high - 0.02 * (high - low)
    whole = noise_images((photographs() * 255).round(), 2)
    assert torch.equal(whole, whole.round())
    assert len(whole.unique()) > 100


@pytest.mark.parametrize("value", [0.0, 1000.0])
def test_noise_like_an_image_of_one_value_is_no_constant(value: float) -> None:
    noise = noise_images(torch.full((2, 3, 8, 8), value), 2)
    assert noise.std() > 0.5
    dark = torch.zeros(2, 1, 16, 16)
    dark[0, 0, 3, 4] = 1  # nearly all of one value
    assert len(noise_images(dark, 1).unique()) > 50
