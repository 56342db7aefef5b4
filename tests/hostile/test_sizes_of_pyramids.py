"""Whether a pyramid can be read does not hang on the size of its images, by value and place against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import nn

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from tests.support.oracle import attention_matrices

SMALL = {"embed_dims": (16, 32, 64, 64), "depths": (1, 1, 1, 1), "num_classes": 0}


def pvt_v2(side: int) -> nn.Module:
    return timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=0)


def twins_pcpvt(side: int) -> nn.Module:
    return timm.create_model("twins_pcpvt_small", img_size=side, num_heads=(2, 4, 4, 4), **SMALL)


def vitpose(side: int) -> nn.Module:
    """Its patch embedding pads by two pixels, so that cells begin before the image and leave its last pixels out."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.VitPoseBackboneConfig(image_size=[side, side], patch_size=[8, 8], **shape)
    return transformers.VitPoseBackbone(config)


def sharp(model: nn.Module) -> nn.Module:
    """The model as it starts, with larger queries and keys, so that attention is no flat one."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(part in name for part in (".q.", ".kv.", "query.", "key.")):
            parameter.data *= 8
    return model.eval()


@pytest.mark.parametrize(
    ("side", "seed"), [(64, 0), (96, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((64, 1), (128, 0)))]
)
@pytest.mark.parametrize(("build", "cells"), [(pvt_v2, 32), (twins_pcpvt, 32), (vitpose, 8)])
def test_every_layer_at_every_size(build: Callable[[int], nn.Module], cells: int, side: int, seed: int) -> None:
    """All of them have their keys row by row, by their own code, and as many queries as a finer grid has cells."""
    torch.manual_seed(seed)
    model, images, lines = sharp(build(side)), torch.randn(2, 3, side, side), side // cells
    sites = AttentionRecorder(model, query="mean").sites(images)
    matrices = attention_matrices(model, images, default_forward)
    assert len(sites) == len(matrices) == (2 if build is vitpose else 4)
    for site, matrix in zip(sites, matrices, strict=True):
        assert site.layout is not None, site.refusal
        assert site.layout.grid == (lines, lines)
        assert site.layout.patches == tuple(range(lines**2))
        finer = site.places.query_grid or site.layout.grid
        rows = {"mean": matrix.mean(2)}
        if site.places.patch_queries:
            assert finer[0] * finer[1] == matrix.shape[2]
            rows |= {(finer[0] - 1, 1): matrix[:, :, (finer[0] - 1) * finer[1] + 1]}  # type: ignore[dict-item]
        for query, row in rows.items():
            (seen,) = record_attention(model, images, layers=site.index, query=query)
            assert float((seen.rows - row).abs().max()) * site.keys <= 1e-3
