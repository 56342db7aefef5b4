"""Constructions that were refused for reasons that were not the case: read, or refused for what was seen."""

# Annotations are not strings here: custom_op of PyTorch 2.4 wants the types themselves.
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttnMonitorError, record_attention
from tests.hostile.test_unseen_attention import IMAGES, Block, Core, ViT, check_layers, plain, scores


def refusal(model: nn.Module, **arguments: Any) -> str:
    with pytest.raises(AttnMonitorError) as caught:
        record_attention(model, IMAGES, **arguments)
    return str(caught.value)


class OfOneImage(ViT):
    """Each image by itself, in `torch.vmap`."""

    def forward(self, images: Tensor) -> Tensor:
        alone: Callable[[Tensor], Tensor] = torch.vmap(lambda image: ViT.forward(self, image[None])[0])
        return alone(images)


def test_a_model_under_vmap_is_read() -> None:
    torch.manual_seed(0)
    model, same = OfOneImage(plain, plain), ViT(plain, plain)
    same.load_state_dict(model.state_dict())
    for layer, other in zip(*(record_attention(m, IMAGES, layers="all") for m in (model, same)), strict=True):
        torch.testing.assert_close(layer.maps, other.maps, atol=1e-6, rtol=1e-4)
    check_layers(same, {0: 0, 1: 1})


def heads_in_queries(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One key for all heads, of which the queries are in one sequence."""
    weights = scores(q.flatten(1, 2), k[:, 0]).softmax(-1)
    return (weights @ v[:, 0]).view_as(q)


def additive(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = (q[:, :, :, None] + k[:, :, None]).tanh().sum(-1).softmax(-1)
    return block.truth @ v


def in_chunks(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([scores(some, k).softmax(-1) @ v for some in q.split(7, 2)], 2)


def sparse(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raw = scores(q, k)
    return (raw - raw.mean(-1, keepdim=True)).clamp_min(0) @ v


def thrown_away(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores(k, q).softmax(-1) @ v
    return scores(q, k).softmax(-1) @ v


def values_compared(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.shared["covariance"] = v.mT @ v
    return scores(q, k).softmax(-1) @ v


def summed(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    out = weights @ v
    block.shared["sums"] = weights @ torch.ones_like(v)
    return out


@torch.library.custom_op("attn_monitor_tests::transposed_keys", mutates_args=())
def transposed_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k).softmax(-1) @ v


def in_one_operation(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = transposed_keys(q, k.mT.contiguous(), v)
    return result


class Rounded(ViT):
    """Images in steps, as of int8."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward((images * 2).round() / 2)


@pytest.mark.parametrize(
    ("core", "arguments", "seen"),
    [
        (heads_in_queries, {}, "2 of its queries could be the CLS token, [0, 25]: they change together with cls"),
        (heads_in_queries, {"query": "mean"}, "has more queries (50) than tokens"),
        (additive, {}, "its scores do not follow from one product of queries and keys"),
        (in_chunks, {"query": "mean"}, "has some of the queries: there is no mean over the tokens here"),
        (thrown_away, {}, "have the same values and some of the same queries"),
        (values_compared, {}, "what it reads (V) is an operand of another product too"),
        (summed, {}, "its weights are summed up in a further product"),
        (in_one_operation, {}, "not known as attention (attn_monitor_tests.transposed_keys.default)"),
        (sparse, {}, "batched products, none of them of a softmax over the last dimension with values"),
    ],
)
def test_what_was_seen_is_the_reason(core: Core, arguments: dict[str, Any], seen: str) -> None:
    assert seen in refusal(ViT(core, core, core), **arguments)


def test_tokens_that_follow_images_in_steps() -> None:
    assert "do not change in proportion to small changes of the patches" in refusal(Rounded(plain, plain))
