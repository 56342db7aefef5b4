"""Attention rollout against the explicit product of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.rollout import attention_rollout
from attn_monitor.errors import QueryError, UnsupportedAttentionError
from tests.integration.test_capture import Watch, vit
from tests.support.oracle import attention_matrices
from tests.support.tiers import sweep
from tests.support.zoo import enliven, timm_model

IMAGES = torch.randn(2, 3, 80, 72, generator=torch.Generator().manual_seed(3))  # more tokens than are taken at a time


def explicit_product(model: nn.Module, fusion: str, residual: float) -> Tensor:
    """(B, T, T) by multiplying whole matrices in float64."""
    matrices = attention_matrices(model, IMAGES, default_forward)
    product = torch.eye(matrices[0].shape[-1], dtype=torch.float64)
    for matrix in matrices:
        fused = {"mean": matrix.mean(1), "max": matrix.amax(1), "min": matrix.amin(1)}[fusion]
        fused = fused / fused.sum(-1, keepdim=True)
        product = (residual * torch.eye(fused.shape[-1]) + (1 - residual) * fused) @ product
    return product


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("residual", sweep([0.5, 0.1], quick=1))
def test_rollout_equals_the_product(fusion: Any, residual: float, fused: bool) -> None:
    model = vit(depth=3, fused=fused, img_size=(80, 72))
    product = explicit_product(model, fusion, residual)
    seen = attention_rollout(model, IMAGES, head_fusion=fusion, residual=residual)
    assert seen.shape == (2, 10, 9)
    assert float((seen.flatten(1) - product[:, 0, 1:]).abs().amax()) * 91 <= 1e-3
    assert float(product[:, 0, 1:].amax()) * 91 > 1.2
    patch = attention_rollout(model, IMAGES, query=(1, 2), head_fusion=fusion, residual=residual)
    assert float((patch.flatten(1) - product[:, 12, 1:]).abs().amax()) * 91 <= 1e-3
    mean = attention_rollout(model, IMAGES, query="mean", head_fusion=fusion, residual=residual)
    assert float((mean.flatten(1) - product.mean(1)[:, 1:]).abs().amax()) * 91 <= 1e-3


def test_rollout_takes_memory_linear_in_tokens() -> None:
    model = vit(img_size=128, patch_size=4, depth=2)
    images = torch.randn(1, 3, 128, 128)
    with Watch() as watch:
        attention_rollout(model, images)
    assert watch.largest < 1025**2 * 4 / 2  # most of it: qkv of the 12 images that the layout is found with


def test_rollout_refuses_what_it_cannot_follow() -> None:
    class_attention = enliven(
        timm_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4)
    )
    with pytest.raises(UnsupportedAttentionError, match=r"layer 0 \(blocks.0.attn.*mixes its heads.*record_attention"):
        attention_rollout(class_attention, IMAGES[..., :32, :32])
    channels = enliven(timm_model("xcit_nano_12_p8_224", img_size=32, embed_dim=32, depth=1, num_heads=4))
    with pytest.raises(UnsupportedAttentionError, match=r"layer 0 \(blocks.0.attn.*several parts of the image"):
        attention_rollout(channels, IMAGES[..., :32, :48])
    with pytest.raises(QueryError, match='query="mean"'):
        attention_rollout(vit(class_token=False, global_pool="avg"), IMAGES[..., :32, :48])
    with pytest.raises(ValueError, match="head_fusion='median'"):
        attention_rollout(vit(), IMAGES, head_fusion="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"residual=1\.0"):
        attention_rollout(vit(), IMAGES, residual=1.0)
