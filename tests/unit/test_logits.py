"""The largest attention logit against float64 scores, the flag on its growth, and its chart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, AttentionRecorder, HealthFlag, HealthLimits, ProbeBatch
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.draw.charts import MARK
from attn_monitor.measure.health import Health
from attn_monitor.measure.logit_growth import LogitGrowth
from attn_monitor.measure.metrics import LARGEST
from attn_monitor.measurements import MetricKey, Metrics
from attn_monitor.trackers.publisher import Publisher
from tests.support.helpers import tiny_vit
from tests.support.oracle import logit_matrices
from tests.support.zoo import CASES, Case

DEFAULT = HealthLimits()
LIBRARIES = {
    "timm": "vit_tiny_patch16_224",
    "timm, eager": "vit_tiny_patch16_224, fused_attn off",
    "timm, a bias by relative position": "beit_base_patch16_224",
    "timm, the same, eager": "beit_base_patch16_224, fused_attn off",
    "Hugging Face, fused": "ViT, sdpa",
    "Hugging Face, eager": "ViT, eager",
    "torchvision": "VisionTransformer",
    "hand-written": "DINO v1",
}


def case_of(name: str) -> Case:
    """The model of this name in the zoo."""
    return next(case for case in CASES if case.name == name)


def every_layer(model: nn.Module, images: Tensor, **settings: Any) -> Any:
    """All layers with every query read."""
    return AttentionRecorder(model, layers="all", logits=True, every_query="all", **settings)(images)


@pytest.mark.parametrize("name", LIBRARIES.values(), ids=LIBRARIES)
def test_logits_of_libraries(name: str) -> None:
    case = case_of(name)
    images = case.images()
    expected = logit_matrices(case.model(), images, default_forward)
    seen = every_layer(case.model(), images)
    assert len(seen) == len(expected) == case.layers
    for attention, scores in zip(seen, expected, strict=True):
        torch.testing.assert_close(attention.max_logit.double(), scores.amax((-2, -1)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(attention.max_logit_cls.double(), scores[:, :, 0].amax(-1), rtol=1e-4, atol=1e-4)
        assert (attention.max_logit > attention.max_logit_cls).any()


class Masked(nn.Module):
    """Attention whose strongest pairs are masked in one of several ways; more tokens than fit in one chunk."""

    def __init__(self, way: str, grid: int = 12) -> None:
        super().__init__()
        self.way, self.tokens = way, grid**2 + 1
        self.proj, self.cls = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
        self.position = nn.Parameter(torch.randn(1, grid**2, 32))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 8)
        self.bias = nn.Parameter(3 * torch.randn(4, self.tokens, self.tokens))
        visible = torch.rand(self.tokens, self.tokens) > 0.3
        self.register_buffer("visible", visible | torch.eye(self.tokens, dtype=torch.bool))

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images).flatten(2).transpose(1, 2) + self.position
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if self.way == "subtracted":
            first, second = (a @ b.mT for a, b in ((q, k), (k, q)))
            out = (first.softmax(-1) - 0.5 * second.softmax(-1)) @ v
        elif self.way == "eager":
            scores = (q @ k.mT * 0.9 + self.bias).masked_fill(~self.visible, torch.finfo(q.dtype).min)
            out = scores.softmax(-1) @ v
        else:
            arguments: dict[str, Any] = {
                "bool mask": {"attn_mask": self.visible, "scale": 0.9},
                "bias": {"attn_mask": self.bias.expand(len(x), -1, -1, -1).masked_fill(~self.visible, -math.inf)},
                "causal": {"is_causal": True},
            }[self.way]
            out = nnf.scaled_dot_product_attention(q, k, v, **arguments)
        return self.out(out.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("way", ["bool mask", "bias", "causal", "eager"])
def test_masked_pairs_do_not_count(way: str) -> None:
    model, images = Masked(way).eval(), torch.randn(2, 3, 48, 48)
    (scores,) = logit_matrices(model, images, lambda m, x: m(x))
    (seen,) = every_layer(model, images, query=5)
    torch.testing.assert_close(seen.max_logit.double(), scores.amax((-2, -1)), rtol=1e-4, atol=1e-4)
    assert seen.max_logit_cls is None  # another query was read
    q, k, _ = model.qkv(_tokens(model, images)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    if way == "causal":
        assert ((q @ k.mT / 8**0.5).amax((-2, -1)) > scores.amax((-2, -1)) + 0.01).any(), "the mask hides nothing"


def test_two_softmaxes_subtracted_have_no_logits() -> None:
    (seen,) = every_layer(Masked("subtracted").eval(), torch.randn(2, 3, 48, 48))
    assert seen.kind == "signed"
    assert seen.max_logit is None
    assert seen.max_logit_cls is None


def _tokens(model: Masked, images: Tensor) -> Tensor:
    x = model.proj(images).flatten(2).transpose(1, 2) + model.position
    return torch.cat([model.cls.expand(len(x), -1, -1), x], 1)


def test_by_default_every_query_of_the_last_layer() -> None:
    """And the CLS query of each; by name every query of each. The largest counts, not the mean."""
    model, probe = tiny_vit(depth=3), ProbeBatch(torch.randn(2, 3, 32, 32))
    of_default = AttentionMonitor(probe, layers="all").snapshot({"teacher": model}, step=0)
    named = AttentionMonitor(probe, layers="all", metrics=["max_logit"]).snapshot({"teacher": model}, step=0)

    def measured(snapshot: Any, metric: str) -> list[int]:
        return [layer for layer in range(3) if metric in snapshot.metrics.of_layer("teacher", layer)]

    assert (measured(of_default, "max_logit"), measured(of_default, "max_logit_cls")) == ([2], [0, 1, 2])
    assert measured(named, "max_logit") == [0, 1, 2]
    values = named.layer("teacher", 1).max_logit
    assert named.metrics["teacher", 1, "max_logit", None] == float(values.max())
    assert named.metrics["teacher", 1, "max_logit", 2] == float(values[:, 2].max())


def growing(values: list[float], every: int = 10, limits: HealthLimits = DEFAULT) -> list[HealthFlag]:
    """Flags of a model of which the queries of one head grow, so that its largest logit takes these values."""
    model = tiny_vit(qkv_bias=False)
    monitor = AttentionMonitor(ProbeBatch(torch.randn(2, 3, 32, 32)), metrics=["max_logit"], health=limits)
    monitor.snapshot({"teacher": model}, step=0)
    now = monitor.previous.metrics["teacher", 1, "max_logit", 2]
    queries, flags = model.blocks[1].attn.qkv.weight[16:24], []
    monitor.forget()
    for number, value in enumerate(values):
        with torch.no_grad():
            queries.mul_(value / now)
        now = value
        flags += monitor.snapshot({"teacher": model}, step=every * number).flags
        assert monitor.previous.metrics["teacher", 1, "max_logit", 2] == pytest.approx(value, rel=1e-3)
    return flags


def test_growth_is_told_before_the_line_is_crossed() -> None:
    (flag,) = growing([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    assert (flag.kind, flag.layer, flag.heads, flag.step) == ("max_logit", 1, (2,), 60)
    assert flag.value == pytest.approx(64, rel=1e-3)
    # It doubles every ten steps: 100 is log2(100 / 64) doublings away, 65,504 is log2(65504 / 64).
    assert flag.text == (
        "largest attention logit 64, 16.0 times that of 40 steps before; at this rate it passes 100 at step 66 and "
        "65,504 at step 160"
    )


@pytest.mark.parametrize(
    ("values", "flagged"),
    [
        ([1.0, 2, 4, 8, 12, 16, 18, 20, 21, 22], False),  # attention forms, and settles
        ([150.0, 150, 155, 150, 160, 150], False),  # a model that came with large logits
        ([20.0, 21, 22, 23, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42], False),  # 100 is far away at this rate
        ([60.0, 62, 64, 70, 90, 110, 121], True),  # slowly, but beyond it, and twice what it was
        ([1.0, 300, 200, 150, 120, 110], True),  # at once
    ],
)
def test_what_is_growth(values: list[float], flagged: bool) -> None:
    assert [flag.kind for flag in growing(values)] == ["max_logit"] * flagged


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.0, 20, 60, 120], "120, up from 0 30 steps before, above 100"),  # q and k began as zeros
        ([-3.5, 20, 60, 120], "120, up from -3.5 30 steps before, above 100"),
        ([1.0, math.nan, 150], "150, above 100"),
    ],
)
def test_growth_from_nothing(values: list[float], text: str) -> None:
    growth = LogitGrowth()
    for number, value in enumerate(values):
        growth.add(10 * number, value)
    said = growth.finding(100)
    assert said is not None
    assert said.partition(";")[0] == f"largest attention logit {text}"


def test_the_line_can_be_moved_and_growth_survives_a_checkpoint() -> None:
    assert not growing([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], limits=HealthLimits(logit=math.inf))
    with pytest.raises(ValueError, match="logit=0; expected a logit above 0"):
        HealthLimits(logit=0)
    whole, parts, attention = Health(DEFAULT), Health(DEFAULT), _attention()
    for step in range(8):
        measured: Any = {("teacher", 1): {"max_logit_cls": torch.full((1, 4), 2.0**step)}}
        whole.examine(step, attention, measured)
        parts.examine(step, attention, measured)
        restored = Health(DEFAULT)
        restored.load_state_dict(json.loads(json.dumps(parts.state_dict())))
        parts = restored
    assert [f.text for f in whole.flags] == [f.text for f in parts.flags]
    assert whole.flags[0].text.startswith("largest attention logit of the CLS query 64, ")


def _attention() -> Any:
    (seen,) = AttentionRecorder(tiny_vit())(torch.randn(1, 3, 32, 32))
    return {("teacher", 1): seen}


def test_chart_of_all_layers(tmp_path: Path) -> None:
    """Logged live in one picture, the whole run in it also after a resume, when early snapshots were thinned out."""
    model, probe = tiny_vit(depth=3), ProbeBatch(torch.randn(1, 3, 32, 32))
    monitor = AttentionMonitor(probe, layers="all")
    publisher = Publisher([], probe, folder=tmp_path)
    for step in range(120):
        monitor.curves.add(step, Metrics({MetricKey("teacher", 0, "max_logit_cls"): 1.0 + step}))
    monitor.snapshot({"teacher": model}, step=120)
    resumed = AttentionMonitor(probe, layers="all")
    resumed.load_state_dict(monitor.state_dict())
    for curves in (monitor.curves, resumed.curves):
        points = curves.of(LARGEST)["teacher", 0, "max_logit_cls", None]
        assert (points[0], points[-1][0], len(points) <= 96) == ((0, 1.0), 120, True)
    publisher.publish(monitor.previous)
    publisher.close()
    with Image.open(next((tmp_path / "pictures").rglob("*attn_overview?logits*"))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    line = (abs(pixels - np.array(MARK)).sum(-1) < 60).sum(1)  # of the colour of the lines at 100 and 65,504
    assert len([row for row in range(1, len(line)) if line[row] > 400 >= line[row - 1]]) == 2
