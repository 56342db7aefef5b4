"""A map shows the row of one query: where its token gets the results of other queries too, it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.capture.layer_selection import QuerySpec
from attn_monitor.errors import AttentionError, UnsupportedAttentionError
from tests.hostile.test_unseen_attention import IMAGES, Block, Core, ViT, check_layers, plain, scores
from tests.support.tiers import sweep

REASON = "also gets results of other queries|not all results of its queries go to the tokens"

Change = Callable[[Tensor], Tensor]
"""``change(results)``: the (B, H, T, D) results that are used instead of those of T queries."""


def exchanged(results: Tensor) -> Tensor:
    order = torch.arange(25)
    order[0], order[8] = 8, 0
    return results[:, :, order]


def moving_average(results: Tensor) -> Tensor:
    tokens = torch.arange(25)
    weights = (0.6 * 0.4 ** (tokens - tokens[:, None]).clamp_min(0)).triu()  # CLS, the first, averages over all
    return weights.to(results) @ results


MIXED: dict[str, Change] = {
    "minus their mean": lambda o: o - o.mean(2, keepdim=True),
    "plus their mean": lambda o: o + o.mean(2, keepdim=True),
    "CLS gets the mean": lambda o: torch.cat([o.mean(2, keepdim=True), o[:, :, 1:]], 2),
    "CLS gets half the mean": lambda o: torch.cat([(o[:, :, :1] + o.mean(2, keepdim=True)) / 2, o[:, :, 1:]], 2),
    "CLS gets the largest": lambda o: torch.cat([o.amax(2, keepdim=True), o[:, :, 1:]], 2),
    "CLS gets that of a patch": lambda o: torch.cat([o[:, :, 1:2], o[:, :, 1:]], 2),
    "CLS exchanged with a patch": exchanged,
    "shifted": lambda o: (o + o.roll(1, 2)) / 2,
    "moving average": moving_average,
    "fixed matrix": lambda o: torch.randn(25, 25, generator=torch.Generator().manual_seed(1)).to(o) @ o,
    "CLS gets a weighted sum": lambda o: torch.cat([torch.arange(25).to(o).softmax(0)[None] @ o, o[:, :, 1:]], 2),
    "standardised": lambda o: (o - o.mean(2, keepdim=True)) / (o.std(2, keepdim=True) + 1e-5),
}


def mixing(change: Change) -> Core:
    return lambda block, q, k, v: change(plain(block, q, k, v))


def refused_layers(model: nn.Module) -> None:
    with pytest.raises(UnsupportedAttentionError, match=REASON):
        record_attention(model, IMAGES, layers=0)
    with pytest.raises(AttentionError):  # the keys of the second layer may hold no patches either
        record_attention(model, IMAGES)


@pytest.mark.parametrize("change", sweep(MIXED, quick=4))
def test_results_mixed_in_every_layer(change: str) -> None:
    refused_layers(ViT(mixing(MIXED[change]), mixing(MIXED[change])).eval())


@pytest.mark.parametrize("change", sweep(MIXED, quick=4))
def test_results_mixed_in_the_first_layer_alone(change: str) -> None:
    model = ViT(mixing(MIXED[change]), plain).eval()
    with pytest.raises(UnsupportedAttentionError, match=REASON):
        record_attention(model, IMAGES, layers=0)


@pytest.mark.parametrize("change", sweep(MIXED, quick=4))
def test_results_mixed_in_the_last_layer_alone(change: str) -> None:
    model = ViT(plain, mixing(MIXED[change])).eval()
    with pytest.raises(UnsupportedAttentionError, match=REASON):
        record_attention(model, IMAGES)
    check_layers(model, {0: 0})


def test_results_mixed_by_a_hook() -> None:
    model = ViT(plain, plain).eval()
    for block in model.blocks:
        block.get_submodule("out").register_forward_hook(lambda _, __, o: o - o.mean(1, keepdim=True))
    refused_layers(model)


class MeanBetween(ViT):
    """Between the blocks, CLS gets the mean of the patches: no attention does that, and each is as it is shown."""

    def run(self, x: Tensor) -> Tensor:
        """All blocks, one after the other."""
        for block in self.blocks:
            x = block(x)
            x = torch.cat([x[:, :1] + x[:, 1:].mean(1, keepdim=True), x[:, 1:]], 1)
        return x


RIGHT: dict[str, Change] = {
    "scaled for each token": lambda o: o * torch.linspace(0.1, 2, 25).to(o)[:, None],
    "hardly scaled": lambda o: o * 1e-5,
    "of length 1": lambda o: o / o.norm(dim=-1, keepdim=True).clamp_min(1e-6),
}


@pytest.mark.parametrize("change", RIGHT)
def test_results_that_cls_alone_gets(change: str) -> None:
    check_layers(ViT(*[mixing(RIGHT[change])] * 3).eval(), {0: 0, 1: 1, -1: 2})


def test_cls_is_mixed_with_patches_between_blocks() -> None:
    check_layers(MeanBetween(plain, plain, plain).eval(), {0: 0, 1: 1, -1: 2})


def agents(_: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Pooled agents attend to the keys, and queries to agents; the product of both maps comes first."""
    pooled = F.adaptive_avg_pool2d(q[:, :, 1:].mT.flatten(0, 1).unflatten(2, (4, 6)), (2, 3)).flatten(2).mT
    pooled = pooled.unflatten(0, q.shape[:2])
    of_agents, of_queries = scores(pooled, k).softmax(-1), scores(q, pooled).softmax(-1)
    of_queries @ of_agents
    return of_queries @ (of_agents @ v)


@pytest.mark.parametrize("query", ["mean", 0, (0, 1)])
@pytest.mark.parametrize("layer", [0, 1])
def test_agents_beside_the_product_of_their_maps(layer: int, query: QuerySpec) -> None:
    with pytest.raises(AttentionError):
        record_attention(ViT(agents).eval(), IMAGES, layers=layer, query=query)
