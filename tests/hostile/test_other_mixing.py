"""What tokens get of others beside the weights that meet V: such weights are not all, and are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.errors import AttentionError, QueryError, UnsupportedAttentionError
from tests.hostile.test_unseen_attention import IMAGES, Block, Core, ViT, check_layers, plain, scores


def sigmoid(q: Tensor, k: Tensor) -> Tensor:
    return (scores(q, k) - 1).sigmoid()


def divided_after(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = sigmoid(q, k)
    return (weights @ v) / weights.sum(-1, keepdim=True)


def divided_by_sums_from_before(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = sigmoid(q, k)
    one_over_sums = 1 / weights.sum(-1, keepdim=True)
    return (weights @ v) * one_over_sums


def beside_a_logged_softmax(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.shared["entropy"] = scores(q, k).softmax(-1).log().sum(-1)
    weights = scores(q, k).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def divided_by_a_product(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = sigmoid(q, k)
    return (weights @ v) / (weights @ torch.ones_like(v[..., :1]))


def divided_by_a_channel(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = sigmoid(q, k) @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return out[..., :-1] / out[..., -1:]


def plus_mean(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return 0.7 * (scores(q, k).softmax(-1) @ v) + 0.3 * v.mean(2, keepdim=True)


def cls_plus_mean(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = scores(q, k).softmax(-1) @ v
    return torch.cat([out[:, :, :1] + 0.3 * v[:, :, 1:].mean(2, keepdim=True), out[:, :, 1:]], 2)


def plus_a_uniform_product_before(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    mean = torch.full_like(weights, 1 / 25) @ v
    return 0.7 * (weights @ v) + 0.3 * mean


def plus_largest_of_the_batch(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(block, q, k, v) + v.amax()


def scaled_by_the_batch(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(block, q, k, v) * v.norm() / 10


def without_mean_result(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = plain(block, q, k, v)
    return out - out.mean(2, keepdim=True)


REFUSED = {
    divided_after: "scaled by something of other tokens, such as the sums of weights",
    divided_by_sums_from_before: "scaled by something of other tokens, such as the sums of weights",
    beside_a_logged_softmax: "scaled by something of other tokens, such as the sums of weights",
    divided_by_a_product: "its weights are summed up in a further product",
    divided_by_a_channel: "a channel of V is one number for all keys",
    plus_mean: "its weights are not all that mixes them there",
    cls_plus_mean: "its weights are not all that mixes them there",
    plus_largest_of_the_batch: "its weights are not all that mixes them there",
    without_mean_result: "also gets results of other queries, which are mixed after the product",
    scaled_by_the_batch: "scaled by something of other tokens, such as the sums of weights",
    plus_a_uniform_product_before: r"meet the same values in two products",
}


@pytest.mark.parametrize("core", REFUSED, ids=lambda core: core.__name__)
def test_weights_that_are_not_all_are_refused(core: Core) -> None:
    with pytest.raises(UnsupportedAttentionError, match=REFUSED[core]):
        record_attention(ViT(core).eval(), IMAGES[:1])
    model = ViT(plain, core).eval()
    with pytest.raises(UnsupportedAttentionError, match=REFUSED[core]):
        record_attention(model, IMAGES)
    check_layers(model, {0: 0})


@pytest.mark.parametrize("core", [plus_largest_of_the_batch, scaled_by_the_batch], ids=lambda core: core.__name__)
def test_what_is_the_same_for_a_whole_batch_is_seen_however_large_it_is(core: Core) -> None:
    model, images = ViT(core, plain).eval(), torch.cat([IMAGES] * 4)
    for layer in (0, 1):
        with pytest.raises(AttentionError):
            record_attention(model, images, layers=layer)
    with pytest.raises(UnsupportedAttentionError, match=REFUSED[core]):
        record_attention(ViT(plain, core).eval(), images)


class Convolution(Block):
    """A depthwise convolution over the patches' V beside attention, as in CSWin: a position encoding."""

    def __init__(self, model: ViT, number: int, core: Core) -> None:
        super().__init__(model, number, core)
        self.conv = nn.Conv2d(16, 16, 3, 1, 1, groups=16)


def plus_convolution(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    patches = v[:, :, 1:].mT.unflatten(-1, (4, 6)).flatten(0, 1)
    near = block.get_submodule("conv")(patches).flatten(2).mT.unflatten(0, v.shape[:2])
    return block.truth @ v + F.pad(near, (0, 0, 1, 0))


def plus_v(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(block, q, k, v) + v


def gated_by_queries(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(block, q, k, v) * block.other(q).sigmoid()


def of_length_1(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.normalize(plain(block, q, k, v), dim=-1)


def not_normalised(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = sigmoid(q, k)
    return block.truth @ v


def heads_scaled(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1) * torch.tensor([0.5, 1.2]).to(q)[:, None, None]
    return block.truth @ v


@pytest.mark.parametrize(
    "core",
    [plus_convolution, plus_v, gated_by_queries, of_length_1, not_normalised, heads_scaled],
    ids=lambda core: core.__name__,
)
def test_what_mixes_no_other_tokens_or_near_ones_alone_is_read(core: Core) -> None:
    model = ViT()
    model.blocks = nn.ModuleList(Convolution(model, number, core) for number in range(2))
    check_layers(model.eval(), {0: 0, -1: 1})
    record_attention(model, IMAGES[:1])


def heads_in_a_loop(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([scores(q[:, head], k[:, head]).softmax(-1) @ v[:, head] for head in (0, 1)], 1)


def queries_in_chunks(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([scores(part, k).softmax(-1) @ v for part in q.split(10, 2)], 2)


def test_heads_in_a_loop_are_one_layer_that_is_refused() -> None:
    model = ViT(heads_in_a_loop, plain, heads_in_a_loop, plain).eval()
    check_layers(model, {1: 1, 3: 3, -1: 3, -3: 1})
    for layer in (0, 2, -2):
        with pytest.raises(UnsupportedAttentionError, match="2 attentions run side by side in one call of blocks"):
            record_attention(model, IMAGES, layers=layer)
    with pytest.raises(UnsupportedAttentionError, match="2 attentions run side by side"):
        record_attention(ViT(plain, heads_in_a_loop).eval(), IMAGES)
    check_layers(ViT(plain, heads_in_a_loop).eval(), {-2: 0})


def test_chunks_of_queries_are_one_layer_with_the_row_of_cls() -> None:
    chunked = ViT(queries_in_chunks, plain, queries_in_chunks).eval()
    whole = ViT(plain, plain, plain).eval()
    whole.load_state_dict(chunked.state_dict())
    for layer in (0, 1, 2, -1, -3):
        (found,), (expected,) = (record_attention(model, IMAGES, layers=layer) for model in (chunked, whole))
        assert found.layer == expected.layer
        torch.testing.assert_close(found.maps, expected.maps, atol=1e-6, rtol=1e-4)
    with pytest.raises(QueryError, match="some of the queries"):
        record_attention(chunked, IMAGES, query="mean")
