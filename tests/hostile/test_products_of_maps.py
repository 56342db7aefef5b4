"""Products of a softmax that are logged and go nowhere: the layer is the product with V."""

from __future__ import annotations

import pytest
from torch import Tensor

from attn_monitor import record_attention
from tests.hostile.test_unseen_attention import IMAGES, Block, Core, ViT, check_layers, scores


def rollout(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention rollout, with a share of the identity, before the product with V."""
    block.truth = scores(q, k).softmax(-1)
    mixed = 0.5 * block.truth.mean(1)
    mixed.diagonal(dim1=-2, dim2=-1).add_(0.5)
    block.shared["rollout"] = mixed @ block.shared["rollout"] if block.number else mixed
    return block.truth @ v


def with_the_map_before(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    block.shared["agreement"] = block.truth @ block.shared["map"] if block.number else block.truth
    block.shared["map"] = block.truth
    return block.truth @ v


def squared(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    block.shared["squared"] = block.truth @ block.truth
    return block.truth @ v


def similarities_of_queries(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    block.shared["similarities"] = block.truth @ block.truth.mT
    return block.truth @ v


@pytest.mark.parametrize("core", [rollout, with_the_map_before, squared, similarities_of_queries])
def test_a_product_of_two_maps_is_no_attention(core: Core) -> None:
    model = ViT(core, core, core)
    check_layers(model, {0: 0, 1: 1, 2: 2, -1: 2})
    assert [layer.layer for layer in record_attention(model, IMAGES, layers="all")] == [0, 1, 2]
