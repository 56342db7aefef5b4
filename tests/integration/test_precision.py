"""Whatever precision training runs in, rows are judged by what it allows and metrics are computed in float32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attn_monitor import AttentionMapCallback, ProbeBatch
from attn_monitor import functional as F
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.measure.metrics import METRICS, measure
from tests.support import forked
from tests.support.helpers import Distillation, loader, tiny_vit, trainer

METRICS_OF_ALL = tuple(METRICS)


def precise(rows: torch.Tensor, masks: torch.Tensor) -> float:
    """Mean Jaccard index over heads and images, by NumPy in float64: of DINO's mask at 0.6, and one object."""
    values = []
    for image, truth in zip(rows.double().numpy(), masks[:, 0].numpy(), strict=True):
        for head in image:
            p = head / head.sum()
            order = np.argsort(p)
            kept = np.zeros(p.shape, bool)
            kept[order] = np.cumsum(p[order]) > 0.4
            shown = np.kron(kept.reshape(4, 4), np.ones((8, 8), bool)).astype(bool)
            values.append((shown & truth).sum() / (shown | truth).sum())
    return float(np.mean(values))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_jaccard_index_is_as_fine_as_in_float32(tmp_path: Path, precision: Any) -> None:
    masks = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    masks[:, :, :19, 5:] = True
    probe = ProbeBatch(loader().dataset.images[:4], masks=masks)
    watch = AttentionMapCallback(probe)
    trainer(tmp_path, watch, max_steps=1, precision=precision).fit(Distillation(), loader())
    assert watch.monitor is not None
    last = watch.monitor.previous
    assert last is not None
    expected = precise(last.maps("student").flatten(-2), masks)
    assert last.metrics["attn/student/layer1/jaccard"] == pytest.approx(expected, abs=1e-6)


def test_metrics_do_not_depend_on_what_surrounds_them() -> None:
    """All metrics on the same rows, within autocast and with another default type, and as they are."""
    torch.manual_seed(0)
    images, model = torch.randn(2, 3, 32, 32), tiny_vit()
    (attention,) = record_attention(model, images)
    other = record_attention(tiny_vit(), images)[0]
    truth = torch.rand(2, 1, 32, 32) > 0.4
    layers = {("student", 1): attention, ("teacher", 1): other}
    before = {("student", 1): other}
    plain = measure(layers, before, metrics=METRICS_OF_ALL, threshold=0.6, truth=truth)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            within = measure(layers, before, metrics=METRICS_OF_ALL, threshold=0.6, truth=truth)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() is torch.bfloat16
        overlap = F.jaccard(truth.flatten(), torch.ones(2 * 32 * 32, dtype=torch.bool))
    finally:
        torch.set_default_dtype(torch.float32)
    assert overlap.dtype is torch.float32
    for key, values in plain.items():
        for name, value in values.items():
            assert torch.equal(value, within[key][name]), name


def test_distance_does_not_depend_on_the_default_type() -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 3, 96, 96)
    recorder = AttentionRecorder(tiny_vit(img_size=96), distance=True)
    expected = recorder(images)[0].distance
    torch.set_default_dtype(torch.bfloat16)
    try:
        distance = recorder(images)[0].distance
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected is not None
    assert distance is not None
    torch.testing.assert_close(distance, expected, rtol=1e-6, atol=1e-5)


def test_the_cosine_of_tokens_is_measured_outside_autocast() -> None:
    torch.manual_seed(0)
    model, seen = tiny_vit(), []
    recorder = AttentionRecorder(model, tokens=True)
    with torch.autocast("cpu", torch.bfloat16):
        recorder(torch.randn(2, 3, 32, 32))
        model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
        cosine = recorder(torch.randn(2, 3, 32, 32))[0].cosine
    expected = torch.nn.functional.cosine_similarity(seen[-1][:, :1], seen[-1][:, 1:], dim=-1).mean(-1)
    assert cosine is not None
    torch.testing.assert_close(cosine, expected, rtol=1e-6, atol=1e-6)


TF32 = """
import sys, torch
from attn_monitor.capture.observe.tolerance import TOLERANCE
from attn_monitor.capture.observe.tolerance import tolerance
exec(sys.argv[1])
for device in ("cuda", "cpu"):
    print([str(d)[6:] for d, t in TOLERANCE.items() if t == tolerance(torch.float32, torch.device(device))][0])
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="the setting came with PyTorch 2.9")
@pytest.mark.parametrize(
    ("setting", "cuda", "cpu"),
    [
        ("pass", "float32", "float32"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "float16", "float32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "float16", "float32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "float32", "float32"),
        ("torch.backends.fp32_precision = 'tf32'", "float16", "float16"),
        ("torch.set_float32_matmul_precision('medium')", "float16", "bfloat16"),
    ],
)
def test_what_float32_products_are_made_of(setting: str, cuda: str, cpu: str) -> None:
    """In a process of its own: once the new setting is used, the old one can never be read again."""
    ran = forked.run([sys.executable, "-c", TF32, setting], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [cuda, cpu]
