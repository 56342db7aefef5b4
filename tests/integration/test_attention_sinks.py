"""Attention sinks: measured against the whole matrix in float64, told apart in models built to have each kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionMonitor, AttentionSnapshot, ProbeBatch
from attn_monitor.measure.sinks import AttentionSink, find_sinks
from attn_monitor.measurements import MetricKey, Metrics
from attn_monitor.record.curves import Curves
from attn_monitor.trackers.publisher import Publisher
from attn_monitor.trackers.sink_table import COLUMNS, markdown, sink_rows
from tests.support.events import Events
from tests.support.helpers import tiny_vit
from tests.support.oracle import attention_matrices

GRID, PREFIX, HEADS = 8, 3, 4
TOKENS = PREFIX + GRID**2
PLACES = {"CLS": 0, "register 2": 2, "patches": PREFIX + 19}


class Sinking(nn.Module):
    """One layer with CLS and two registers; every query is drawn to one token, whose values are scaled."""

    def __init__(self, token: int | None, values: float = 1.0, strength: float = 5.0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 4, 4)
        self.cls, self.registers = nn.Parameter(torch.randn(1, 32)), nn.Parameter(torch.randn(PREFIX - 1, 32))
        self.position = nn.Parameter(torch.randn(GRID**2, 32))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 8)
        bias, scale = torch.zeros(TOKENS), torch.ones(TOKENS, 1)
        if token is not None:
            bias[token], scale[token] = strength, values
        self.register_buffer("bias", bias)
        self.register_buffer("scale", scale)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images).flatten(2).transpose(1, 2) + self.position
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.registers.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, 8)).permute(2, 0, 3, 1, 4)
        out = nnf.scaled_dot_product_attention(q, k, v * self.scale, attn_mask=self.bias.expand(TOKENS, -1))
        x = self.out(out.transpose(1, 2).flatten(2))
        return x[:, 0]


def looked_at(model: nn.Module, **settings: Any) -> AttentionSnapshot:
    """Its one layer, with the whole matrix read."""
    probe = ProbeBatch(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return AttentionMonitor(probe, **settings).snapshot({"teacher": model.eval()}, step=0)


def sinks_of(snapshot: AttentionSnapshot) -> tuple[str, list[AttentionSink]]:
    """Of the teacher's last layer, where they are known."""
    queries, sinks = find_sinks(snapshot.layer("teacher"))
    assert sinks is not None
    return queries, sinks


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("values", "verdict"), [(0.1, "a sink that carries nothing"), (1.5, "a sink that broadcasts")])
def test_models_built_to_have_a_sink(place: str, values: float, verdict: str) -> None:
    model = Sinking(PLACES[place], values)
    snapshot = looked_at(model)
    attention = snapshot.layer("teacher")
    queries, (sink,) = sinks_of(snapshot)
    assert (queries, sink.token, sink.tokens, sink.verdict) == ("every query", place, 1.0, verdict)

    (matrix,) = attention_matrices(model, _images(), lambda m, x: m(x))
    received = matrix.mean((1, 2)).numpy()
    np.testing.assert_allclose(attention.received, received, rtol=1e-4)
    share = received[:, PLACES[place]]
    assert sink.share == pytest.approx(share.mean(), rel=1e-4)
    assert sink.times_uniform == pytest.approx(share.mean() * TOKENS, rel=1e-4)
    assert snapshot.metrics["teacher", 0, "sink_share", None] == pytest.approx((share - 1 / TOKENS).mean(), rel=1e-3)
    np.testing.assert_allclose(attention.value_norms, value_norms(model, matrix), rtol=1e-3)
    assert sink.value == pytest.approx(
        np.average(value_norms(model, matrix)[:, PLACES[place]], weights=share), rel=1e-3
    )


def _images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def value_norms(model: Sinking, matrix: Tensor) -> np.ndarray:
    """Written anew in NumPy: of each head, the norm of V against the median token's, weighted by attention."""
    kept: list[Tensor] = []
    handle = model.qkv.register_forward_hook(lambda _, __, out: kept.append(out.detach()))
    with torch.no_grad():
        model(_images())
    handle.remove()
    v = kept[0].double().numpy().reshape(3, TOKENS, 3, HEADS, 8)[:, :, 2] * model.scale.numpy()[None, :, None]
    norms = np.sqrt((v**2).sum(-1))  # (B, T, H)
    relative, weights = norms / np.median(norms, 1, keepdims=True), matrix.mean(2).numpy().transpose(0, 2, 1)
    return (relative * weights).sum(-1) / weights.sum(-1)


def test_no_sink() -> None:
    snapshot = looked_at(Sinking(None))
    assert find_sinks(snapshot.layer("teacher")) == ("every query", [])
    assert snapshot.metrics["teacher", 0, "sink_share", None] < 0.01
    (row,) = sink_rows(snapshot, Curves())
    assert row.verdict == "no sink"
    snapshot.layer("teacher").received[0, 3] = math.nan
    (row,) = sink_rows(snapshot, Curves())
    assert row.verdict.startswith("not known")
    not_finite = AttentionSink("CLS", 1.0, 0.5, 20.0, value=math.nan)
    assert not_finite.verdict == "a sink"  # what it carries is not known


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("register 2", "the registers work: attention collects on them and on no patch"),
        ("patches", "attention collects on patches in spite of the registers"),
        ("CLS", "attention collects on no register and on no patch"),
    ],
)
def test_whether_registers_work(place: str, said: str) -> None:
    rows = sink_rows(looked_at(Sinking(PLACES[place])), Curves())
    assert [(row.token, row.verdict) for row in rows][1:] == [("registers", said)]


def test_only_the_last_layer_is_read_whole_by_default() -> None:
    """Of the others it is told where the CLS query looks, and said so; by name each is read whole."""
    model, probe = tiny_vit(depth=3, reg_tokens=1), ProbeBatch(torch.randn(2, 3, 32, 32))
    default = AttentionMonitor(probe, layers="all").snapshot({"teacher": model}, step=0)
    named = AttentionMonitor(probe, layers="all", metrics=["sinks"]).snapshot({"teacher": model}, step=0)
    told = [find_sinks(default.layer("teacher", layer))[0] for layer in range(3)]
    assert told == ["the CLS query", "the CLS query", "every query"]
    assert [key.metric for key in default.metrics if "sink" in key.metric] == ["sink_share_cls"] * 2 + ["sink_share"]
    assert {key.metric for key in named.metrics} == {"sink_share"}
    (matrix, *_) = attention_matrices(model, probe.images, lambda m, x: m(x))
    np.testing.assert_allclose(named.layer("teacher", 0).received, matrix.mean((1, 2)), rtol=1e-4)


def test_the_mean_over_queries_is_what_is_received() -> None:
    probe = ProbeBatch(_images())
    snapshot = AttentionMonitor(probe, query="mean").snapshot({"teacher": Sinking(2).eval()}, step=0)
    queries, (sink,) = sinks_of(snapshot)
    assert (queries, sink.token) == ("every query", "register 2")


def test_archived_and_since_when(tmp_path: Path) -> None:
    snapshot = looked_at(Sinking(2))
    snapshot.save(tmp_path / "s.npz")
    loaded = AttentionSnapshot.load(tmp_path / "s.npz")
    for name in ("received", "value_norms"):
        assert torch.equal(getattr(loaded.layer("teacher"), name), getattr(snapshot.layer("teacher"), name))
    curves = Curves()
    for step, share in [(0, 0.0), (10, 0.2), (20, 0.001), (30, 0.05), (40, 0.3)]:
        curves.add(step, Metrics({MetricKey("teacher", 0, "sink_share"): share}))
    assert [row.since for row in sink_rows(loaded, curves)] == [30, None]


def test_table_at_the_end(tmp_path: Path) -> None:
    """In TensorBoard as text; on W&B as a table, see `test_wandb.py`."""
    snapshot = looked_at(Sinking(2, values=0.1))
    with SummaryWriter(str(tmp_path)) as writer:
        publisher = Publisher([writer], ProbeBatch(_images()))
        publisher.publish(snapshot)
        publisher.close()
    text = Events(tmp_path).text("attn_monitor/sinks")
    assert text == markdown(COLUMNS, sink_rows(snapshot, curves_of(snapshot)))
    header, _, row, registers = (line.strip("| ").split(" | ") for line in text.splitlines())
    told = dict(zip(COLUMNS, row, strict=True))
    assert tuple(header) == COLUMNS
    assert (told["queries"], told["token"], told["since step"]) == ("every query", "register 2", "0")
    assert (told["verdict"], math.isclose(float(told["V / median"]), 0.1, rel_tol=0.3)) == (
        "a sink that carries nothing", True,
    )  # fmt: skip
    assert registers[-1].startswith("the registers work")


def curves_of(snapshot: AttentionSnapshot) -> Curves:
    curves = Curves()
    curves.add(snapshot.step, snapshot.metrics)
    return curves
