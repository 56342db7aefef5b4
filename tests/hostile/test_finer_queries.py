"""Pyramids whose keys are pooled and whose queries are not: a mean over finer queries, and the query of one patch."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import nn

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.errors import QueryError
from tests.support.oracle import attention_matrices
from tests.support.zoo import enliven


def pvt_v2() -> nn.Module:
    return timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1))


def segformer() -> nn.Module:
    return transformers.SegformerModel(transformers.SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 40, 64]))


@pytest.mark.parametrize("build", [pvt_v2, segformer])
def test_a_mean_over_finer_queries(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, images = enliven(build()).eval(), torch.randn(3, 3, 128, 128)
    matrices = attention_matrices(model, images, default_forward)
    seen = AttentionRecorder(model, layers="all", query="mean")(images)
    assert {attention.layer for attention in seen} >= {0, 2, 3}
    for attention in seen:
        assert attention.grid == (4, 4)
        expected = matrices[attention.layer].mean(2)
        assert float((attention.rows - expected).abs().max()) * 16 <= 1e-3


@pytest.mark.parametrize("build", [pvt_v2, segformer])
def test_a_patch_of_the_finer_grid(build: type[nn.Module]) -> None:
    """Query (row, column) is of the queries' grid: 32 × 32 in the first stage, over keys of 4 × 4."""
    torch.manual_seed(0)
    model, images = enliven(build()).eval(), torch.randn(3, 3, 128, 128)
    matrices = attention_matrices(model, images, default_forward)
    for layer, side in ((0, 32), (2, 8)):
        (seen,) = record_attention(model, images, layers=layer, query=(side - 2, 3))
        expected = matrices[layer][:, :, (side - 2) * side + 3]
        assert float(expected.max()) * 16 > 1.2
        assert float((seen.rows - expected).abs().max()) * 16 <= 1e-3
        with pytest.raises(QueryError, match=f"a grid of {side} rows and {side} columns of queries"):
            record_attention(model, images, layers=layer, query=(side, 0))
    with pytest.raises(QueryError, match="all of them patches"):
        record_attention(model, images, layers=0)


@pytest.mark.slow
def test_finer_queries_whose_results_go_elsewhere_are_no_patches() -> None:
    """The mean over all of them does not depend on where results go."""
    torch.manual_seed(0)
    model, images = enliven(pvt_v2()).eval(), torch.randn(3, 3, 128, 128)
    model.stages[0].blocks[0].attn.register_forward_hook(lambda module, args, out: out.roll(5, 1))
    with pytest.raises(QueryError, match=r"none of which is known to be patch \(30, 3\)"):
        record_attention(model, images, layers=0, query=(30, 3))
    (seen,) = record_attention(model, images, layers=0, query="mean")
    expected = attention_matrices(model, images, default_forward)[0].mean(2)
    assert float((seen.rows - expected).abs().max()) * 16 <= 1e-3


def test_finer_queries_in_another_order_are_unknown() -> None:
    torch.manual_seed(0)
    model, images = enliven(pvt_v2()).eval(), torch.randn(3, 3, 128, 128)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    attention = model.stages[0].blocks[0].attn
    attention.q.register_forward_hook(lambda module, args, out: out[:, order])
    attention.register_forward_hook(lambda module, args, out: out[:, order.argsort()])
    with pytest.raises(QueryError, match=r"none of which is known to be patch \(30, 3\)"):
        record_attention(model, images, layers=0, query=(30, 3))
