"""A block without observed attention is called again with other tokens; it may reject them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attn_monitor.capture.recorder import record_attention
from attn_monitor.errors import UnsupportedAttentionError
from tests.support.styles import MemEffAttention, PlainViT
from tests.support.zoo import enliven


class Choosy(MemEffAttention):
    """Attention in a form that is not recognised, for tokens of a small range only."""

    recognised = True

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        if self.recognised:
            return super().forward(x, attn_bias)
        if float(x.abs().amax()) > 6:
            raise ValueError("activation out of range")
        weights = (x @ x.mT).softmax(1)  # over queries
        return self.proj(torch.einsum("bij,bjd->bid", weights, x))


def test_a_block_that_rejects_other_tokens_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model: nn.Module = enliven(PlainViT(Choosy(), Choosy(), Choosy())).eval()
    model.blocks[2].attn.recognised = False
    images = torch.randn(2, 3, 32, 48)
    with pytest.raises(UnsupportedAttentionError, match=r"layer 2 \(blocks\.2\.attn\)") as refused:
        record_attention(model, images)
    assert "ValueError: activation out of range" in str(refused.value)
    assert "not known" in str(refused.value)
    assert record_attention(model, images, layers=1)[0].verified_error < 1e-5
