"""Attention, token orders, masks and registers put together: right for each query, or refused for its reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.errors import UnsupportedAttentionError
from tests.hostile.test_unseen_attention import IMAGES, Block, Core, ViT, plain, scores

ORDERS: dict[str, list[int]] = {
    "shuffled": torch.randperm(24, generator=torch.Generator().manual_seed(2)).tolist(),
    "snake": [6 * row + (column if row % 2 == 0 else 5 - column) for row in range(4) for column in range(6)],
    "by columns": [6 * row + column for column in range(6) for row in range(4)],
    "reversed": [*range(23, -1, -1)],
}


class Ordered(ViT):
    """CLS and registers, then the patches in some order."""

    def __init__(self, order: list[int], registers: int, *cores: Core) -> None:
        super().__init__(*cores)
        self.order, self.first = order, 1 + registers
        self.register_tokens = nn.Parameter(torch.randn(1, registers, 32))

    def forward(self, images: Tensor) -> Tensor:
        x = (self.embed(images).flatten(2).mT + self.pos[:, 1:])[:, self.order]
        own = torch.cat([self.cls, self.register_tokens], 1).expand(len(x), -1, -1)
        return self.run(torch.cat([own, x], 1))[:, 0]


def capped(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = ((scores(q, k) / 5).tanh() * 5).softmax(-1)
    return block.truth @ v


def causal(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    block.truth = scores(q, k).masked_fill(~seen, -torch.inf).softmax(-1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def largest_alone(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    least = logits.topk(8, -1).values[..., -1:]
    block.truth = logits.masked_fill(logits < least, -torch.inf).softmax(-1)
    return block.truth @ v


def of_two_softmaxes(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (scores(a, b).softmax(-1) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True))
    block.truth = first - 0.3 * second
    return block.truth @ v


def doubly_stochastic(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).exp()
    for _ in range(3):
        weights = weights / weights.sum(-2, keepdim=True)
        weights = weights / weights.sum(-1, keepdim=True)
    block.truth = weights
    return weights @ v


def queries_turned_and_back(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    return (scores(q.roll(3, 2), k).softmax(-1) @ v).roll(-3, 2)


def keys_in_another_order(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(4))
    block.truth = scores(q, k).softmax(-1)
    return F.scaled_dot_product_attention(q, k[:, :, order], v[:, :, order])


def tokens_first(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    folded = [t.permute(2, 0, 1, 3).flatten(1, 2).transpose(0, 1) for t in (q, k, v)]
    weights = torch.bmm(folded[0] / 4, folded[1].mT).softmax(-1)
    return torch.bmm(weights, folded[2]).view_as(q)


def as_sharp_as_the_image(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = (scores(q, k) * (1 + q.mean((1, 2, 3), keepdim=True).sigmoid())).softmax(-1)
    return block.truth @ v


READ = [capped, causal, largest_alone, of_two_softmaxes, doubly_stochastic, queries_turned_and_back]
READ += [keys_in_another_order, tokens_first, as_sharp_as_the_image]


@pytest.mark.parametrize("number", range(len(READ)), ids=[core.__name__ for core in READ])
def test_each_query_is_right_wherever_tokens_stand(number: int) -> None:
    order, registers = list(ORDERS.values())[number % 4], number % 3
    model = Ordered(order, registers, plain, READ[number]).eval()
    with torch.no_grad():
        model(IMAGES)
    truth, patches = model.blocks[1].truth, [model.first + order.index(cell) for cell in range(24)]
    rows = {"cls": truth[:, :, 0], "mean": truth.mean(2), (1, 2): truth[:, :, patches[8]]}
    for query, wanted in rows.items():
        (got,) = record_attention(model, IMAGES, query=query)  # type: ignore[arg-type]
        torch.testing.assert_close(got.maps.flatten(2), wanted[..., patches], atol=1e-5, rtol=1e-3)


def results_at_the_next_token(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(block, q, k, v).roll(1, 2)


def other_keys_than_values(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(4))
    return F.scaled_dot_product_attention(q, k[:, :, order], v)


def without_the_mean_of_values(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(block, q, k, v) - v.mean(2, keepdim=True)


def every_key_twice(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, torch.cat([k, k / 2], 2), torch.cat([v, v], 2))


REFUSED = {
    results_at_the_next_token: "not all results of its queries go to the tokens",
    other_keys_than_values: "its keys and its values hold different patches",
    without_the_mean_of_values: "its weights are not all that mixes them there",
    every_key_twice: "each patch of the image is held by 2 of its keys",
}


@pytest.mark.parametrize("core", REFUSED, ids=lambda core: core.__name__)
def test_what_has_no_true_map_is_refused_for_its_reason_in_any_order(core: Core) -> None:
    for order, registers in ((ORDERS["snake"], 0), (ORDERS["shuffled"], 2)):
        with pytest.raises(UnsupportedAttentionError, match=REFUSED[core]):
            record_attention(Ordered(order, registers, plain, core).eval(), IMAGES, query="mean")
