"""Pyramids whose keys are pooled and whose queries are not: a mean over finer queries, and the query of one patch."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import nn

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import AttentionRecorder
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
