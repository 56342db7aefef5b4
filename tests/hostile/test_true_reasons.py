"""A refusal says what was seen and what follows from it, and never names a cause that may be another."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attn_monitor import AttnMonitorError, record_attention
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.errors import ForwardError, InputTypeError, NonFiniteAttentionError, ProbeError
from tests.support.helpers import tiny_vit
from tests.support.styles import MemEffAttention, PlainViT
from tests.support.zoo import enliven

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def refusal(model: nn.Module, images: Tensor = IMAGES, **arguments: Any) -> str:
    with pytest.raises(AttnMonitorError) as caught:
        record_attention(enliven(model).eval(), images, **arguments)
    return str(caught.value)


class CrossAttention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QueryingTransformer(nn.Module):
    """Learned queries read the image's patches, and then each other, as in BLIP-2."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.queries = nn.Parameter(torch.randn(1, 6, 32))
        self.cross_attn, self.self_attn = CrossAttention(), CrossAttention()

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = self.cross_attn(self.queries.expand(len(images), -1, -1), patches)
        return self.self_attn(x, x)


class StemOfOverlaps(nn.Module):
    """A convolutional network whose every cell sees all of the image, before attention, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        steps = [nn.Sequential(nn.Conv2d(c, 32, 7, 2, 3), nn.GroupNorm(1, 32), nn.ReLU()) for c in (3, 32, 32)]
        self.stem, self.attn = nn.Sequential(*steps), CrossAttention()

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = x + x.mean(1, keepdim=True)
        return self.attn(x.roll(images.flatten(1).sum(1).abs().long()[0].item() % 5, 1), x)


class ChannelAttention(nn.Module):
    """As many channels as patches attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, -1)).permute(2, 0, 3, 4, 1)
        return self.proj(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))


def test_what_learned_queries_have_gathered() -> None:
    """It depends on the image, and each query holds all of it."""
    text = refusal(QueryingTransformer())
    assert "self_attn" in text
    assert "depends on the image through other attention alone" in text


def test_channels_are_not_called_patches() -> None:
    text = refusal(PlainViT(ChannelAttention()), layers=0)
    assert "32 keys" in text
    assert "several parts of the image, so none of them is a patch" in text
    assert "32 patches" not in text


@pytest.mark.parametrize("model", [QueryingTransformer, lambda: PlainViT(ChannelAttention()), StemOfOverlaps])
def test_no_reason_is_empty_or_a_list_of_guesses(model: Any) -> None:
    recorder = AttentionRecorder(enliven(model()).eval(), layers="all")
    for site in recorder.sites(IMAGES):
        if site.refusal is not None:
            text = str(site.refusal)
            assert not re.search(r": *\.|drawn: *$|, or (an order|tokens mixed)|\(.* or .*\)", text), text


def test_a_page_of_an_error_is_one_line() -> None:
    class Verbose(PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("\n".join(["", "the first line", *["more"] * 200]))

    text = refusal(Verbose())
    assert "RuntimeError: the first line … more. Pass images of a size" in text
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize("model", [lambda images: images, nn.Linear, "vit", None])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(InputTypeError, match=r"model: received .*, expected a torch\.nn\.Module\. Pass the module"):
        record_attention(model, IMAGES)


@pytest.mark.parametrize(
    ("images", "kind", "words"),
    [
        (IMAGES[0], InputTypeError, r"received \(3, 32, 48\) torch.float32, expected a floating-point tensor"),
        (IMAGES.byte(), InputTypeError, r"torch\.uint8, expected a floating-point tensor"),
        ([IMAGES.numpy()], InputTypeError, "received a list"),
        (IMAGES[:0], ProbeError, r"\(0, 3, 32, 48\) torch.float32, which holds no pixel"),
        (IMAGES.to("meta"), ProbeError, "meta device, which has no values"),
        (IMAGES.clone().index_fill_(0, torch.tensor([1]), torch.nan), ProbeError, "NaN or infinity in image 1, "),
    ],
)
@pytest.mark.parametrize("call", ["record", "sites", "check"])
def test_images_that_cannot_be_looked_at(images: Any, kind: type[Exception], words: str, call: str) -> None:
    recorder = AttentionRecorder(tiny_vit().eval())
    with pytest.raises(kind, match=words):
        {"record": recorder, "sites": recorder.sites, "check": recorder.check}[call](images)


def test_nested_images() -> None:
    nested = torch.nested.nested_tensor([IMAGES[0], IMAGES[1]], layout=torch.jagged)
    with pytest.raises(InputTypeError, match="nested tensor"):
        record_attention(tiny_vit().eval(), nested)


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = PlainViT(MemEffAttention())
    with pytest.raises(ForwardError, match="has no values"):
        record_attention(model, IMAGES)


def test_weights_that_are_nan_are_called_so() -> None:
    """Images are finite: it is not they that are named."""
    model = PlainViT(MemEffAttention())
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteAttentionError):
        record_attention(model, IMAGES)
