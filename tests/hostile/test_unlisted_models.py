"""Constructions of several outside checks that no list of kinds had foreseen, each with its own truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.errors import AttentionError, ForwardError, QueryError, UnsupportedAttentionError, VerificationError
from tests.hostile.test_unseen_attention import IMAGES, Block, Core, ViT, check_layers, plain, scores
from tests.support.releases import since_torch

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


@since_torch(2, 6, "such tensors run under dispatch modes")
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


class OfTheBatch(ViT):
    """A model with images that depend on their place in the batch, on its size, or on the images beside them."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(plain, plain)
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT + self.pos[:, 1:]
        return self.run(torch.cat([self.cls.expand(len(x), -1, -1), self.change(x)], 1))[:, 0]


def with_the_next(x: Tensor) -> Tensor:
    return x + 0.5 * x.roll(1, 0)


def rolled_by_place(x: Tensor) -> Tensor:
    return torch.stack([tokens.roll(i, 0) for i, tokens in enumerate(x)])


def last_one_reversed(x: Tensor) -> Tensor:
    return torch.cat([x[:-1], x[-1:].flip(1)])


def reversed_in_pairs(x: Tensor) -> Tensor:
    return x.flip(1) if len(x) == 2 else x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_the_next, "depend on its place in the batch, on the images beside it"),
        (rolled_by_place, "depend on its place in the batch, on the images beside it"),
        (last_one_reversed, "an image alone has other tokens than the same image in a batch"),
        (reversed_in_pairs, "an image alone has other tokens than the same image in a batch"),
    ],
)
def test_what_depends_on_the_batch_is_not_called_random_and_is_read_alone(
    change: Callable[[Tensor], Tensor], reason: str
) -> None:
    model = OfTheBatch(change).eval()
    with pytest.raises(AttentionError, match=f"{reason}.*Record one image at a time"):
        record_attention(model, IMAGES)
    (layer,) = record_attention(model, IMAGES[:1])
    model(IMAGES[:1])
    weights = model.blocks[1].truth[:, :, 0, 1:]
    weights = weights.flip(2) if change is last_one_reversed else weights
    torch.testing.assert_close(layer.maps.flatten(2), weights, atol=1e-5, rtol=1e-3)


class OfTheBatchLater(OfTheBatch):
    """The first block comes before what depends on the batch."""

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(images), -1, -1), self.embed(images).flatten(2).mT], 1) + self.pos
        x = self.blocks[0](x)
        return self.run(torch.cat([x[:, :1], self.change(x[:, 1:])], 1))[:, 0]

    def run(self, x: Tensor) -> Tensor:
        return self.blocks[1](x)  # type: ignore[no-any-return]


def without_half_of_the_mean(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True) / 2


@pytest.mark.parametrize("change", [last_one_reversed, reversed_in_pairs, without_half_of_the_mean])
def test_a_layer_that_depends_on_the_batch_is_refused_for_that_beside_one_that_does_not(
    change: Callable[[Tensor], Tensor],
) -> None:
    model = OfTheBatchLater(change).eval()
    with pytest.raises(
        UnsupportedAttentionError, match=r"layer 1 .*an image alone has other tokens.*one image at a time"
    ):
        record_attention(model, IMAGES)
    check_layers(model, {0: 0})
    record_attention(model, IMAGES[:1])


def test_a_batch_of_one_size_alone_is_refused_for_its_size() -> None:
    model = OfTheBatch(lambda x: x.reshape(3, 24, 32)).eval()
    with pytest.raises(ForwardError, match=r"ran on 3 images of \(3, 32, 48\) and failed on 1: RuntimeError: shape"):
        record_attention(model, torch.cat([IMAGES, IMAGES[:1]]))


def by_distance(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = (-torch.cdist(q, k)).softmax(-1)
    return block.truth @ v


def test_a_remedy_is_named_only_where_it_works() -> None:
    model = ViT(by_distance, by_distance)
    for query in ("cls", "mean", (1, 2)):
        with pytest.raises(QueryError) as caught:
            record_attention(model, IMAGES, query=query)
        assert 'query="mean"' not in str(caught.value)
    (layer,) = record_attention(model, IMAGES, query=0)
    model(IMAGES)
    torch.testing.assert_close(layer.rows, model.blocks[1].truth[:, :, 0], atol=1e-5, rtol=1e-3)


def entropy_first(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.shared["entropy"] = scores(q, k).softmax(-1).log().sum(-1)
    block.truth = scores(q, k).softmax(-1)
    return F.scaled_dot_product_attention(q, k, v)


def entropy_and_product(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.shared["entropy"] = scores(q, k).softmax(-1).log().sum(-1)
    return plain(block, q, k, v)


def values_projected_after_the_softmax(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    to_out = block.out.weight.unflatten(1, (2, 16))[:16]  # (16, H, 16)
    return block.truth @ torch.einsum("bhkd,ehd->bhke", v, to_out)


@pytest.mark.parametrize("core", [entropy_first, entropy_and_product, values_projected_after_the_softmax])
def test_queries_and_values_of_the_shape_of_a_softmax_are_none(core: Core) -> None:
    """With 16 tokens and 16 channels of a head, q, k and V have the shape of the weights."""
    model, images = ViT(core, core, core), IMAGES[..., :24, :40].contiguous()
    model.pos = nn.Parameter(model.pos.detach()[:, :16])
    check_layers(model, {0: 0, 1: 1, -1: 2}, images)


def exp_in_place(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k)
    weights -= weights.amax(-1, keepdim=True)
    weights.exp_()
    weights /= weights.sum(-1, keepdim=True)
    block.truth = weights
    return weights @ v


def test_exponentials_in_place_are_weights() -> None:
    check_layers(ViT(exp_in_place, plain, exp_in_place), {0: 0, 1: 1, -1: 2})


def mean_map_logged_before(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.shared["seen"] = scores(q, k).softmax(-1).mean(1) @ v.mean(1)
    block.truth = scores(q, k).softmax(-1)
    return F.scaled_dot_product_attention(q, k, v)


def mean_map_logged_after(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = plain(block, q, k, v)
    block.shared["seen"] = F.scaled_dot_product_attention(q.mean(1), k.mean(1), v.mean(1))
    return out


@pytest.mark.parametrize("core", [mean_map_logged_before, mean_map_logged_after])
def test_a_product_that_reaches_no_tokens_is_no_part_of_its_layer(core: Core) -> None:
    check_layers(ViT(core, plain, core), {0: 0, 1: 1, -1: 2})


def chunks_of_keys(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    most, total, out = scores(q, k).new_full((*q.shape[:-1], 1), -1e9), 0.0, 0.0
    for keys, values in zip(k.split(10, 2), v.split(10, 2), strict=True):
        s = scores(q, keys)
        now = torch.maximum(most, s.amax(-1, keepdim=True))
        p, shrunk = (s - now).exp(), (most - now).exp()
        total, out, most = total * shrunk + p.sum(-1, keepdim=True), out * shrunk + p @ values, now
    return out / total


def test_chunks_of_keys_are_refused_for_what_they_are() -> None:
    with pytest.raises(UnsupportedAttentionError, match="its queries meet 3 sets of keys in one call"):
        record_attention(ViT(plain, chunks_of_keys), IMAGES)


def test_patches_that_several_tokens_hold_are_counted_without_a_layer_of_the_patches() -> None:
    model = OfTheBatch(lambda x: x.repeat_interleave(2, 1))
    with pytest.raises(UnsupportedAttentionError, match="each patch of the image is held by 2 of its keys"):
        record_attention(model, IMAGES)


def log_mean_exp(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Means of exponentials have a logarithm; the queries that replace them have none."""
    block.truth = scores(q, k).softmax(-1)
    return (block.truth @ v.exp()).log()


def test_tokens_that_are_nan_without_results_are_said_to_be() -> None:
    model = ViT(log_mean_exp, plain)
    with pytest.raises(UnsupportedAttentionError, match="its tokens are NaN or infinite"):
        record_attention(model, IMAGES)
    check_layers(model, {0: 0})


class Dropping(ViT):
    """Blocks are dropped by chance, in evaluation too."""

    def run(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) if number == 0 or torch.rand(()) < 0.5 else x
        return x


def test_layers_that_are_dropped_by_chance_are_not_called_dependent_on_the_images() -> None:
    torch.manual_seed(0)
    model, seen = Dropping(plain, plain, plain, plain).eval(), set()
    for _ in range(6):
        try:
            record_attention(model, IMAGES)
        except AttentionError as error:
            seen.add("chance" in str(error))
    assert seen <= {True}
