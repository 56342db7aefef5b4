"""Constructions of several outside checks that no list of kinds had foreseen, each with its own truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.errors import UnsupportedAttentionError, VerificationError
from tests.hostile.test_unseen_attention import IMAGES, Block, ViT, check_layers, plain, scores

Weigh = Callable[[Tensor, Tensor], Tensor]


def whole_numbers(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights, scale = (scores(q, k).softmax(-1) * 127).round().int(), v.abs().amax() / 127
    return (weights @ (v / scale).round().int()).float() * scale / 127


def scaled_by_all_values(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v) * (q * (k.softmax(2) * v).sum(2, keepdim=True))


def test_products_of_whole_numbers_are_refused_for_what_they_are() -> None:
    with pytest.raises(UnsupportedAttentionError, match=r"multiplies whole numbers \(int32\)"):
        record_attention(ViT(plain, whole_numbers), IMAGES)


def test_results_that_other_tokens_scale_are_refused_also_where_rows_sum_to_1() -> None:
    model = ViT(plain, scaled_by_all_values)
    with pytest.raises(UnsupportedAttentionError, match="scaled by something of other tokens"):
        record_attention(model, IMAGES)
    check_layers(model, {0: 0})


def sigmoid(q: Tensor, k: Tensor) -> Tensor:
    return scores(q, k).sigmoid() / q.shape[2]


def of_reversed_keys(q: Tensor, k: Tensor) -> Tensor:
    return scores(q, k.flip(2)).softmax(-1)


@pytest.mark.parametrize("weigh", [sigmoid, of_reversed_keys])
def test_a_kernel_that_no_layout_explains_is_refused_whatever_the_size_of_the_batch(weigh: Weigh) -> None:
    """With as many images as heads, the layout that explained most by chance was another one."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weigh(q, k) @ v

    run.__annotations__ = {"q": Tensor, "k": Tensor, "v": Tensor, "return": Tensor}
    kernel = torch.library.custom_op(f"unlisted::{weigh.__name__}", run, mutates_args=())
    with pytest.raises(VerificationError, match="differs from the model's own output"):
        record_attention(ViT(lambda _, q, k, v: kernel(q, k, v)), torch.cat([IMAGES, IMAGES[:1]]))


class Named(Tensor):
    """A tensor with a type of its own and no operations of its own, as MONAI's ``MetaTensor``."""


@pytest.mark.parametrize("where", ["images", "position"])
def test_a_type_of_tensor_without_operations_of_its_own_is_read(where: str) -> None:
    model, images = ViT(plain, plain), IMAGES
    (wanted,) = record_attention(model, images)
    if where == "images":
        images = images.as_subclass(Named)
    else:
        model.pos = nn.Parameter(model.pos.detach().as_subclass(Named))
    (layer,) = record_attention(model, images)
    torch.testing.assert_close(layer.maps.as_subclass(Tensor), wanted.maps)


class CutOut(nn.Module):
    """Patches of ``size`` that begin every 8 pixels, as `F.unfold` cuts them out."""

    def __init__(self, size: int, padding: int) -> None:
        super().__init__()
        self.size, self.padding, self.proj = size, padding, nn.Linear(3 * size * size, 32)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.size, stride=8, padding=self.padding).mT
        return self.proj(patches).mT.unflatten(2, (x.shape[2] // 8, x.shape[3] // 8))


@pytest.mark.parametrize(("size", "padding"), [(12, 2), (16, 4), (12, 4), (10, 0)])
def test_cells_are_the_middles_of_patches_that_overlap_and_are_cut_out(size: int, padding: int) -> None:
    model = ViT(plain, plain)
    model.embed = CutOut(size, padding)  # type: ignore[assignment]
    if padding == 0:  # a last patch would end beyond the image
        images = F.pad(IMAGES, (0, size - 8, 0, size - 8))
        model.embed.forward = lambda x: CutOut.forward(model.embed, x)[..., :4, :6]  # type: ignore[method-assign, arg-type]
    else:
        images = IMAGES
    (layer,) = record_attention(model, images)
    origin = size / 2 - padding - 4
    placed = layer.grid.geometry
    if origin == 0 and padding:
        assert placed is None
    else:
        assert placed is not None
        assert placed.origin == (origin, origin)
        assert placed.cell == (8, 8)
