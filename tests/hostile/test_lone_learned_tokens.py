"""A learned token beside the patches is CLS unless its name, or a mean of the patches beside it, speaks against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attn_monitor import record_attention
from attn_monitor.errors import QueryError
from tests.hostile.test_unseen_attention import IMAGES, ViT, plain

OTHERS = ["reg", "register_tokens", "storage_tokens", "prompt", "prompt_embeddings", "sep_token", "pad_token"]
OTHERS += ["mask_token", "null", "query_embed"]
UNNAMED = ["token", "extra_tokens", "summary"]
CLASSES = ["cls_token", "class_embedding", "cls_prompt"]


class Lone(ViT):
    """The patches, then one learned token with this name, behind the mean of the patches where there is one."""

    def __init__(self, name: str, *, mean: bool = False) -> None:
        super().__init__(plain, plain)
        del self.cls
        self.name, self.mean = name, mean
        self.register_parameter(name, nn.Parameter(torch.randn(1, 1, 32)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.pos if self.mean else x + self.pos[:, 1:]
        return self.run(torch.cat([x, getattr(self, self.name).expand(len(x), -1, -1)], 1)).mean(1)


def shown(model: ViT, query: int, first: int) -> float:
    """The distance of the map from the row of this query, behind so many tokens that are no patches."""
    (got,) = record_attention(model.eval(), IMAGES)
    with torch.no_grad():
        model(IMAGES)
    applied = model.blocks[-1].truth[:, :, query, first : first + 24].unflatten(-1, (4, 6))
    return float((got.maps - applied).abs().max())


@pytest.mark.parametrize("name", [*UNNAMED, *CLASSES])
def test_a_learned_token_is_cls(name: str) -> None:
    assert shown(Lone(name), 24, 0) < 1e-6


@pytest.mark.parametrize("name", OTHERS)
def test_a_token_that_is_called_otherwise_is_not(name: str) -> None:
    with pytest.raises(QueryError, match=rf"by the names of their parameters \({name}\), \[24\] are others"):
        record_attention(Lone(name).eval(), IMAGES)


@pytest.mark.parametrize("name", OTHERS)
def test_the_mean_of_the_patches_is_cls_beside_a_token_that_is_called_otherwise(name: str) -> None:
    assert shown(Lone(name, mean=True), 0, 1) < 1e-6


@pytest.mark.parametrize("name", UNNAMED)
def test_a_learned_token_or_the_mean_of_the_patches(name: str) -> None:
    with pytest.raises(QueryError, match=r"2 of its queries could be the CLS token, \[0, 25\]"):
        record_attention(Lone(name, mean=True).eval(), IMAGES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_token_beside_the_mean_of_the_patches(name: str) -> None:
    assert shown(Lone(name, mean=True), 25, 1) < 1e-6


def test_a_class_token_with_a_parametrization() -> None:
    model = Lone("cls_token", mean=True)
    parametrize.register_parametrization(model, "cls_token", nn.Tanh())
    assert shown(model, 25, 1) < 1e-6
