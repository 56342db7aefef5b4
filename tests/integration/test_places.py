"""What asking a model for places costs, when it is asked, and that it keeps nothing alive."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import record_attention
from tests.support import styles
from tests.support.styles import PlainViT
from tests.support.zoo import enliven, timm_vit

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def vit(**changes: Any) -> nn.Module:
    return enliven(timm_vit("vit_tiny_patch16_224", dynamic_img_size=True, **changes)).eval()


class Counting(nn.Module):
    """Counts the images that a model is run on, outside of what a recording puts back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        BATCHES.append(len(images))
        return self.model(images)


BATCHES = deque[int]()  # no list, which would be a global that the model depends on


@pytest.mark.parametrize(("size", "patch", "most"), [(224, 16, 21), (32, 8, 19)])
def test_a_plain_vit_is_asked_few_images_once(size: int, patch: int, most: int) -> None:
    BATCHES.clear()
    model = Counting(vit(img_size=size, patch_size=patch))
    images = torch.randn(2, 3, size, size)
    record_attention(model, images)
    assert sum(BATCHES) - 2 <= most
    assert max(BATCHES) <= 3, "in pieces no larger than three images, or the batch"
    BATCHES.clear()
    for _ in range(6):
        record_attention(model, images[:1])
    assert sum(BATCHES) == 6 + 3 * 3, "places are checked with three images after 1, 2 and 4 recordings"
    assert max(BATCHES) == 1, "no more at a time than are recorded"


def test_a_model_is_asked_again_for_another_size_precision_or_structure() -> None:
    model = Counting(vit())
    record_attention(model, IMAGES)

    def asked(images: Tensor) -> bool:
        BATCHES.clear()
        record_attention(model, images)
        return sum(BATCHES) > len(images) + 3  # three may be the check of places

    assert not asked(IMAGES)
    assert asked(IMAGES.mT)
    assert not asked(IMAGES)
    model.model.blocks[0].attn = timm_vit("vit_tiny_patch16_224").blocks[0].attn
    assert asked(IMAGES)
    model.double()
    assert asked(IMAGES)


def test_another_forward_is_another_question() -> None:
    model = enliven(PlainViT(styles.MemEffAttention())).eval()

    def mirrored(m: nn.Module, x: Tensor) -> Any:
        return m(x.flip(-1))

    (plain,) = record_attention(model, IMAGES)
    (other,) = record_attention(model, IMAGES, forward=mirrored)
    (again,) = record_attention(model, IMAGES.flip(-1))
    assert torch.equal(other.maps.flip(-1), again.maps)
    assert not torch.allclose(plain.maps, other.maps)


def test_what_is_remembered_keeps_no_model_alive() -> None:
    def record() -> weakref.ref[nn.Module]:
        model = vit()
        record_attention(model, IMAGES, layers="all")
        record_attention(model, IMAGES, forward=lambda m, x: model(x))
        return weakref.ref(model)

    gone = record()
    gc.collect()
    assert gone() is None


def test_asking_draws_no_random_number() -> None:
    model = PlainViT(styles.MemEffAttention())
    before = torch.get_rng_state()
    record_attention(model, IMAGES)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("query", ["cls", (2, 1)])
def test_the_evidence_is_told(query: Any) -> None:
    (attention,) = record_attention(vit(), IMAGES, query=query)
    assert attention.places == "exact"
    (masked,) = record_attention(
        enliven(styles.Dinov2ViT()).eval(), IMAGES, query=query, forward=styles.masked_features
    )
    assert masked.places == "exact but masked"
