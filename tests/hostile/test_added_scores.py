"""Scores to which something is added: relative positions by the query (SAM, MViT), and scores of earlier layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_monitor import record_attention
from attn_monitor.errors import UnsupportedAttentionError
from tests.hostile.test_unseen_attention import IMAGES, Block, Core, ViT, check_layers, plain, scores

ROWS, COLUMNS = 4, 6
TABLES = [torch.randn(2 * n - 1, 16, generator=torch.Generator().manual_seed(5)) / 2 for n in (ROWS, COLUMNS)]


def relative_positions(q: Tensor) -> Tensor:
    """Decomposed along rows and columns, (B, H, N, N), 0 for CLS."""
    of_patches = q[:, :, 1:].unflatten(2, (ROWS, COLUMNS))
    rows, columns = (
        table.to(q)[torch.arange(n)[:, None] - torch.arange(n) + n - 1]
        for table, n in zip(TABLES, (ROWS, COLUMNS), strict=True)
    )
    by_row = torch.einsum("byhwc,hkc->byhwk", of_patches, rows)
    by_column = torch.einsum("byhwc,wkc->byhwk", of_patches, columns)
    bias = (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)
    return F.pad(bias, (1, 0, 1, 0))


def with_positions(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = (scores(q, k) + relative_positions(q)).softmax(-1)
    return block.truth @ v


def with_positions_as_mask(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = (scores(q, k) + relative_positions(q)).softmax(-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=relative_positions(q))


def residual(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of all layers so far are added up, as in RealFormer."""
    total = scores(q, k) + (block.shared["scores"] if block.number else 0)
    block.shared["scores"], block.truth = total, total.softmax(-1)
    return block.truth @ v


@pytest.mark.parametrize("core", [with_positions, with_positions_as_mask, residual], ids=lambda core: core.__name__)
def test_the_sum_of_scores_is_read_in_every_layer_for_every_query(core: Core) -> None:
    model = ViT(*[core] * 6)
    check_layers(model, {number: number for number in range(6)})
    for layer in (1, 5):
        model(IMAGES)
        truth = model.blocks[layer].truth.double()
        (mean,) = record_attention(model, IMAGES, layers=layer, query="mean")
        (patch,) = record_attention(model, IMAGES, layers=layer, query=(1, 2))
        torch.testing.assert_close(mean.rows.double(), truth.mean(2), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(patch.rows.double(), truth[:, :, 1 + COLUMNS + 2], atol=1e-5, rtol=1e-3)


class OneByOne(ViT):
    """Images run one after the other in a loop."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([ViT.forward(self, image[None]) for image in images])


def test_a_loop_over_images_is_said_to_be_one_and_is_read_for_one_image() -> None:
    model = OneByOne(plain, plain)
    with pytest.raises(UnsupportedAttentionError, match=r"one after the other\. Record one image at a time"):
        record_attention(model, IMAGES)
    check_layers(model, {0: 0, -1: 1}, IMAGES[:1])
