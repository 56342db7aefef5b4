"""Backbones that public models are built on, from transformers: readable layers against float64, by value and place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.errors import QueryError
from tests.support.oracle import attention_matrices
from tests.support.zoo import enliven, hugging_face

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
DEEP: dict[str, Any] = {"num_hidden_layers": 3, "image_size": 64, "mlp_ratio": 2}
WINDOWS: dict[str, Any] = {"num_hidden_layers": 3, "image_size": 64, "window_size": 4}
SAM = {**WINDOWS, "mlp_dim": 64, "output_channels": 16, "global_attn_indexes": [1, 2], "num_pos_feats": 16}
VITDET = {**WINDOWS, "pretrain_image_size": 64, "window_block_indices": [0], "out_features": ["stage1", "stage3"]}
PIXIO = {**DEEP, "n_cls_tokens": 4}

Build = Callable[[], nn.Module]
GLOBAL: dict[str, Build] = {
    f"{name} {attention}": partial(hugging_face, f"{name}", f"{config}Config", attention, **settings)
    for name, config, settings in (
        ("SamVisionModel", "SamVision", SAM),
        ("VitDetBackbone", "VitDet", VITDET),
        ("PixioModel", "Pixio", PIXIO),
        ("PixioBackbone", "Pixio", {**PIXIO, "out_features": ["stage1", "stage3"]}),
        ("Dinov2WithRegistersBackbone", "Dinov2WithRegisters", {**DEEP, "out_features": ["stage1", "stage3"]}),
    )
    for attention in (("eager",) if name.startswith("VitDet") else ("sdpa", "eager"))
}


@pytest.fixture(autouse=True)
def _transformers_may_warn() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"transformers\..*")
        yield


@pytest.mark.parametrize("backbone", GLOBAL)
def test_every_layer_over_all_patches_is_right(backbone: str) -> None:
    torch.manual_seed(0)
    model = enliven(GLOBAL[backbone]()).eval()
    for name, table in model.named_parameters():
        if "rel_pos" in name:  # SAM's bias that is computed from queries, and must not outweigh their own scores
            table.data *= 0.2
    matrices = [m for m in attention_matrices(model, IMAGES, lambda m, x: m(x)) if m.shape[-1] >= 64]
    recorder = AttentionRecorder(model, layers="all", query="mean")
    layers = recorder(IMAGES)
    assert len(layers) == len(matrices) == 3 - len(recorder.left_out)
    assert len(recorder.left_out) == backbone.startswith(("Sam", "VitDet"))  # the layer of windows
    for layer, matrix in zip(layers, matrices, strict=True):
        prefix = matrix.shape[-1] - 64
        assert (layer.grid, layer.num_prefix, layer.places) == ((8, 8), prefix, "exact")
        check(layer.maps, matrix.mean(2), prefix)
        (patch,) = record_attention(model, IMAGES, layers=layer.layer, query=(2, 5))
        check(patch.maps, matrix[:, :, prefix + 2 * 8 + 5], prefix)


def check(maps: Tensor, row: Tensor, prefix: int) -> None:
    torch.testing.assert_close(maps.double(), row[..., prefix:].unflatten(-1, (8, 8)), atol=2e-5, rtol=1e-3)


def test_which_of_several_class_tokens_is_asked() -> None:
    model = enliven(GLOBAL["PixioModel sdpa"]()).eval()
    with pytest.raises(QueryError, match=r"4 of its queries could be the CLS token, \[0, 1, 2, 3\]"):
        record_attention(model, IMAGES)
    matrix = attention_matrices(model, IMAGES, lambda m, x: m(x))[-1]
    (third,) = record_attention(model, IMAGES, query=2)
    check(third.maps, matrix[:, :, 2], 4)
