"""Queries and keys that pass through a half precision in a float32 model, as with RoPE in bfloat16 (DINOv3)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.capture.observe.random_projections import precision_of
from tests.support import hostile_attention as at
from tests.support.hostile_judge import Hostile, judge
from tests.support.hostile_orders import fixed
from tests.support.hostile_parts import Block, Net, Reorder, Stem, blocks, fused
from tests.support.oracle import attention_matrices


def rotated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """RoPE over all tokens, computed in a precision and given back in the tokens' own."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10.0 ** -torch.arange(half)
    sin, cos = (torch.cat([f(angle), f(angle)], -1).to(dtype) for f in (torch.sin, torch.cos))
    y = x.to(dtype)
    turned = torch.cat([-y[..., half:], y[..., :half]], -1)
    return (y * cos + turned * sin).to(x.dtype)


def with_rope(dtype: torch.dtype, attend: Any, scale: float = 1.0) -> Any:
    """Attention of rotated queries and keys, scaled by a factor that is no power of two or by none."""

    def rotate_and_attend(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(m, rotated(q, dtype) * scale, rotated(k, dtype), v)

    return rotate_and_attend


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.bfloat16, 0.7), (torch.float16, 1.0)])
def test_places_are_exact_where_queries_were_rounded(dtype: torch.dtype, scale: float) -> None:
    def build() -> nn.Module:
        return Net(Stem("CRR*"), *blocks(with_rope(dtype, fused, scale), count=4))

    judgements = judge(Hostile("rounded", "RoPE", build, must="cls mean patch", tolerance=0.05))
    faults = [f"{j.layer} {j.query}: {j.verdict} {j.reason}" for j in judgements if not j.fine]
    assert not faults, "\n".join(faults)


def test_rounded_queries_hide_no_other_order() -> None:
    rope = partial(with_rope, torch.bfloat16)

    def build() -> nn.Module:
        elsewhere = rope(at.queries_in(fixed(), 1, back=False))
        return Net(Stem(), Block(rope(fused)), Reorder(fixed(7)), Block(rope(fused)), Block(elsewhere))

    judgements = judge(Hostile("rounded", "RoPE", build, tolerance=0.05))
    assert all(j.fine for j in judgements), judgements
    assert [j.verdict for j in judgements] == ["right"] * 6 + ["refused"] * 3


@pytest.mark.parametrize("factor", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 4, 25, 8), (8, 6, 201, 64), (2, 3, 40, 96)])
def test_the_precision_of_numbers_is_seen(dtype: torch.dtype, factor: float, shape: tuple[int, ...]) -> None:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).float() * factor
    assert precision_of(numbers) == dtype
    assert precision_of(numbers.transpose(1, 2)) == dtype


def test_few_numbers_are_not_taken_for_rounded_ones() -> None:
    query = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)).expand(8, 50, 32)
    assert precision_of(query) == torch.float32
    assert precision_of(torch.zeros(4, 5)) == torch.float32
    assert precision_of(F.one_hot(torch.arange(50)).float()) == torch.float32


@pytest.mark.parametrize("scale", [1e-5, 1e-4, 3e-4])
def test_results_are_found_behind_a_small_layer_scale(scale: float) -> None:
    """As at the start of DINOv3: it leaves changes of marked tokens that lie around the rounding of bfloat16."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=64, depth=8, num_heads=4, num_classes=0, init_values=scale, reg_tokens=4
    ).eval()
    for block in model.blocks:
        block.attn.forward = partial(rounded_attention, block.attn)
    images = torch.randn(2, 3, 64, 64)
    layers = record_attention(model, images, layers="all")
    matrices = attention_matrices(model, images, lambda m, x: m(x))
    assert [layer.places for layer in layers] == ["exact"] * 8
    for layer, matrix in zip(layers, matrices, strict=True):
        torch.testing.assert_close(layer.rows.double(), matrix[:, :, 0], atol=1e-4, rtol=1e-2)


def rounded_attention(attention: Any, x: Tensor, **_: Any) -> Tensor:
    q, k, v = attention.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    return attention.proj(
        fused(attention, rotated(q, torch.bfloat16), rotated(k, torch.bfloat16), v).transpose(1, 2).flatten(2)
    )
