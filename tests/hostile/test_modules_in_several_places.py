"""One module at several paths of a model, and tokens from a row of a table."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionRecorder, record_attention
from attn_monitor.errors import LayerError
from tests.hostile.test_unseen_attention import IMAGES, ViT, check_layers, plain


def shared(*order: int) -> ViT:
    model = ViT(plain, plain)
    model.blocks = nn.ModuleList(model.blocks[number] for number in order)
    return model


@pytest.mark.parametrize(("order", "path", "layers"), [
    ((0, 0, 0), "blocks.2", [0, 1, 2]),
    ((0, 0, 0), "blocks.0", [0, 1, 2]),
    ((0, 1, 0), "blocks.2", [0, 2]),
    ((0, 1, 0), "blocks.1", [1]),
    ((0, 1, 0), "blocks", [0, 1, 2]),
])  # fmt: skip
def test_any_path_of_a_module_names_its_layers(order: tuple[int, ...], path: str, layers: list[int]) -> None:
    model = shared(*order)
    found = record_attention(model, IMAGES, layers=path)
    assert [layer.layer for layer in found] == layers
    every = record_attention(model, IMAGES, layers="all")
    assert all(torch.equal(layer.maps, every[layer.layer].maps) for layer in found)


def test_a_path_that_is_the_beginning_of_a_name_is_no_path() -> None:
    with pytest.raises(LayerError, match="no attention ran there"):
        record_attention(shared(0, 1), IMAGES, layers="block")


class OfAClass(ViT):
    """The CLS token is the row of a label in a table of several classes."""

    def __init__(self, classes: int) -> None:
        super().__init__(plain, plain)
        self.labels = nn.Embedding(classes, 32)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        first = self.labels(torch.ones(len(x), dtype=torch.long))[:, None]
        return self.run(torch.cat([first, x], 1) + self.pos)[:, 0]


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_class_token_is_a_row_of_a_table(classes: int) -> None:
    model = OfAClass(classes)
    same = ViT(plain, plain)
    same.load_state_dict(
        {k: v for k, v in copy.deepcopy(model).state_dict().items() if "labels" not in k}, strict=False
    )
    with torch.no_grad():
        same.cls.copy_(model.labels.weight[1])
    check_layers(same, {0: 0, 1: 1})
    for site, other in zip(*(AttentionRecorder(m).sites(IMAGES) for m in (model, same)), strict=True):
        assert site.places.cls == other.places.cls == 0
    for layer, other in zip(*(record_attention(m, IMAGES, layers="all") for m in (model, same)), strict=True):
        torch.testing.assert_close(layer.maps, other.maps)
