"""Numbers made of many queries' rows: each of those rows is what the model computed, or the number is absent."""

# Annotations are not strings here: custom_op of PyTorch 2.4 wants the types themselves.
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, AttentionSnapshot, MetricOptions, ProbeBatch, record_attention
from attn_monitor.capture.rollout import attention_rollout
from attn_monitor.commands.support.matrices import save_matrices
from attn_monitor.errors import VerificationError
from tests.support.helpers import tiny_vit
from tests.support.oracle import plain_attention
from tests.support.releases import TORCH
from tests.support.styles import HEADS, Packed, PlainViT
from tests.support.zoo import enliven

GRID, SIZE = (4, 6), (32, 48)
IMAGES = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
KEPT: list[Tensor] = []


def local(tokens: int) -> Tensor:
    """(T, T) bool: the CLS query sees all, every other query CLS and the four tokens of its group."""
    i = torch.arange(tokens)
    return (i[:, None] // 4 == i // 4) | (i == 0) | (i[:, None] == 0)


@torch.library.custom_op("attn_monitor_tests::patchy", mutates_args=())
def patchy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within small groups, as a block mask makes it, whose mask is nowhere among the arguments."""
    out, matrix = plain_attention(q.double(), k.double(), v.double(), attn_mask=local(q.shape[2]))
    KEPT[:] = [matrix]
    return out.to(q.dtype).contiguous()


@torch.library.custom_op("attn_monitor_tests::one_off", mutates_args=())
def one_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only the last query of all is masked: a mean over all of them hardly moves."""
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask[-1, 1:-1] = False
    return plain_attention(q.double(), k.double(), v.double(), attn_mask=mask)[0].to(q.dtype).contiguous()


@torch.library.custom_op("attn_monitor_tests::slightly", mutates_args=())
def slightly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query is a little sharper: in a mean over all of them, less than what the mean's rounding may be."""
    sharper = torch.ones(q.shape[2], 1, dtype=torch.float64)
    sharper[-1] = 1.002
    return plain_attention(q.double() * sharper, k.double(), v.double())[0].to(q.dtype).contiguous()


@torch.library.custom_op("attn_monitor_tests::open", mutates_args=())
def open_(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Nothing is masked."""
    out, matrix = plain_attention(q.double(), k.double(), v.double())
    KEPT[:] = [matrix]
    return out.to(q.dtype).contiguous()


def with_kernel(*kernels: Any) -> nn.Module:
    """A ViT whose blocks attend by these kernels, which take (B, H, N, D)."""

    def through(kernel: Any) -> Any:
        return lambda q, k, v: kernel(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    torch.manual_seed(0)
    return enliven(PlainViT(*(Packed(through(kernel)) for kernel in kernels))).eval()


def snapshot_of(model: nn.Module, **settings: Any) -> tuple[AttentionMonitor, AttentionSnapshot]:
    monitor = AttentionMonitor(ProbeBatch(IMAGES), **settings)
    return monitor, monitor.snapshot({"backbone": model}, step=0)


@pytest.mark.parametrize("metrics", [None, "all", ["max_logit"], ["sinks"], ["distance"]])
def test_no_number_is_made_of_rows_that_the_model_did_not_compute(metrics: Any) -> None:
    monitor, snapshot = snapshot_of(with_kernel(patchy), metrics=metrics)
    attention = snapshot.layer("backbone")
    (rows,) = (matrix[:, :, 0] for matrix in KEPT)
    torch.testing.assert_close(attention.rows.double(), rows, rtol=1e-3, atol=1e-5)  # the CLS query's own are right
    assert (attention.max_logit, attention.received, attention.distance) == (None, None, None)
    absent = {"max_logit", "sink_share", "distance"}
    assert not absent & {key.metric for key in snapshot.metrics}
    (said,) = monitor.left_out()
    for word in ("layer 0 (blocks.0.attn", "patchy", "the rows of other queries", "the model's own output"):
        assert word in said
    monitor.snapshot({"backbone": with_kernel(patchy)}, step=1)
    assert monitor.left_out() == [said]


def test_what_the_cls_query_says_remains() -> None:
    _, snapshot = snapshot_of(with_kernel(patchy))
    attention, layer = snapshot.layer("backbone"), snapshot.metrics.of_layer("backbone", 0)
    matrix = KEPT[0]
    assert {"max_logit_cls", "sink_share_cls"} <= layer.keys()
    norms = attention.value_norms
    _, right = snapshot_of(with_kernel(open_))
    assert norms is not None
    assert norms.shape == (2, matrix.shape[-1])
    assert {"max_logit", "sink_share"} <= right.metrics.of_layer("backbone", 0).keys()


def test_numbers_stay_absent_where_only_the_first_recording_is_checked() -> None:
    monitor, first = snapshot_of(with_kernel(patchy), metrics=MetricOptions("all", verify="first"))
    model = with_kernel(patchy)
    second = AttentionMonitor(ProbeBatch(IMAGES), metrics=MetricOptions("all", verify="first"))
    names = [
        {key.metric for key in second.snapshot({"backbone": model}, step=step).metrics} - {"drift"} for step in (0, 1)
    ]
    assert names[0] == names[1]
    assert "max_logit" not in names[1]
    assert monitor.left_out()
    assert first.layer("backbone").distance is None


def test_numbers_of_a_right_kernel_are_those_of_float64() -> None:
    model = with_kernel(open_, open_)
    monitor, snapshot = snapshot_of(model, metrics="all", layers="all")
    assert monitor.left_out() == []
    model(IMAGES)
    (matrix,) = KEPT
    attention = snapshot.layer("backbone", 1)
    torch.testing.assert_close(attention.received.double(), matrix.mean((1, 2)), rtol=1e-3, atol=1e-5)
    cells = torch.cartesian_prod(torch.arange(GRID[0]) * 8, torch.arange(GRID[1]) * 8).double()
    p = matrix[:, :, 1:, 1:] / matrix[:, :, 1:, 1:].sum(-1, keepdim=True)
    expected = (p * torch.cdist(cells, cells)).sum(-1).mean(-1)
    torch.testing.assert_close(attention.distance.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", [patchy, one_off, slightly], ids=["all but one", "one of 25", "one a little"])
def test_a_mean_over_rows_of_which_one_is_wrong_is_refused(kernel: Any) -> None:
    model = with_kernel(kernel)
    assert record_attention(model, IMAGES)[0].verified_error < 1e-4
    with pytest.raises(VerificationError, match="differs from the model's own output"):
        record_attention(model, IMAGES, query="mean")


def test_a_mean_in_half_precision_does_not_hide_a_wrong_row() -> None:
    with pytest.raises(VerificationError):
        record_attention(with_kernel(one_off).bfloat16(), IMAGES, query="mean")


def test_rollout_and_whole_matrices_are_refused_too(tmp_path: Path) -> None:
    model = with_kernel(open_, one_off)
    with pytest.raises(VerificationError, match="layer 1"):
        attention_rollout(model, IMAGES)
    with pytest.raises(VerificationError, match="layer 1"):
        save_matrices(model, IMAGES, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(save_matrices(model, IMAGES, tmp_path, layers=0)) == len(IMAGES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_rounding_alone_takes_no_number_away(dtype: torch.dtype, gain: float) -> None:
    """Fused and explicit attention of a sharp ViT, in each precision: all rows are right, so every number is there."""
    if TORCH < (2, 5) and (dtype, gain) == (torch.float16, 3.0):
        pytest.skip("PyTorch 2.4's float16 kernel on CPUs is 40 times its precision off its own rows here")
    for fused in (True, False):
        torch.manual_seed(0)
        model = enliven(tiny_vit(depth=2))
        for block in model.blocks:
            block.attn.fused_attn = fused
            block.attn.qkv.weight.data *= gain
        model = model.eval().to(dtype)
        monitor = AttentionMonitor(ProbeBatch(torch.randn(4, 3, 32, 32)), metrics="all", layers="all")
        snapshot = monitor.snapshot({"backbone": model}, step=0)
        assert monitor.left_out() == []
        assert snapshot.layer("backbone", 1).max_logit is not None
        assert record_attention(model, torch.randn(2, 3, 32, 32), query="mean")


def test_a_mean_equals_that_of_float64() -> None:
    model = with_kernel(open_, open_)
    (attention,) = record_attention(model, IMAGES, query="mean", layers=1)
    torch.testing.assert_close(attention.rows.double(), KEPT[0].mean(2), rtol=1e-3, atol=1e-5)
    assert attention.rows.shape[1] == HEADS
    assert not math.isnan(attention.verified_error)
