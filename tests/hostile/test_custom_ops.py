"""Fused kernels nobody listed: read where a reading reproduces their output, refused where none does."""

# Annotations are not strings here: custom_op of PyTorch 2.4 wants the types themselves.
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.errors import VerificationError
from tests.support.oracle import plain_attention
from tests.support.styles import HEADS, Packed, PlainViT
from tests.support.zoo import enliven

KERNELS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], float | None]] = {}
LAST: dict[str, Tensor] = {}


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The inside of a kernel, for (B, H, N, D); keeps its matrix as the reference."""
    out, matrix = plain_attention(q.double(), k.double(), v.double(), scale=scale)
    LAST["matrix"] = matrix
    return out.to(q.dtype)


def heads_second(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


@torch.library.custom_op("attn_monitor_tests::bnhd", mutates_args=())
def bnhd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xFormers' and flash-attn's layout."""
    return attend(*heads_second(q, k, v)).transpose(1, 2).contiguous()


@torch.library.custom_op("attn_monitor_tests::bhnd", mutates_args=())
def bhnd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@torch.library.custom_op("attn_monitor_tests::scaled", mutates_args=())
def scaled(q: Tensor, k: Tensor, v: Tensor, p: float, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Told its scale, and returns the log-sum-exp beside the result, as flash-attn does."""
    out = attend(*heads_second(q, k, v), scale=softmax_scale).transpose(1, 2).contiguous()
    return out, q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


@torch.library.custom_op("attn_monitor_tests::unscaled", mutates_args=())
def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q comes scaled already."""
    return attend(q, k, v, scale=1.0)


@torch.library.custom_op("attn_monitor_tests::packed", mutates_args=())
def packed(qkv: Tensor) -> Tensor:
    """(B, N, 3, H, D) in, (B, N, H, D) out: flash_attn_qkvpacked_func."""
    return attend(*heads_second(*qkv.unbind(2))).transpose(1, 2).contiguous()


@torch.library.custom_op("attn_monitor_tests::merged", mutates_args=())
def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, D) in, (B, N, H·D) out."""
    return attend(q, k, v).transpose(1, 2).flatten(2).contiguous()


@torch.library.custom_op("attn_monitor_tests::secret", mutates_args=())
def secret(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softens its scores in a way that nobody can know."""
    return attend(q, k, v, scale=0.9 / math.sqrt(q.shape[-1]))


@torch.library.custom_op("attn_monitor_tests::gate", mutates_args=())
def gate(x: Tensor, scalar: Tensor, factor: float) -> Tensor:
    """No attention at all: scalars and 0-d tensors go through it."""
    return x * scalar * factor


def through(kernel: Callable[..., Tensor], layout: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Call a kernel from (B, N, H, D) tensors."""
    if layout == "bnhd":
        return lambda q, k, v: kernel(q, k, v)
    return lambda q, k, v: kernel(*heads_second(q, k, v)).transpose(1, 2)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bnhd": through(bnhd, "bnhd"),
    "bhnd": through(bhnd, "bhnd"),
    "scale among its arguments": lambda q, k, v: scaled(q, k, v, 0.0, 0.21)[0],
    "unscaled": through(lambda q, k, v: unscaled(q * 0.37, k, v), "bhnd"),
    "packed": lambda q, k, v: packed(torch.stack([q, k, v], 2)),
    "merged heads": lambda q, k, v: merged(*heads_second(q, k, v)).unflatten(-1, (HEADS, -1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("query", ["cls", "mean"])
@pytest.mark.parametrize("grid", [(4, 6), (1, 3)], ids=["24 patches", "as many tokens as heads"])
def test_unlisted_kernel_is_read(way: str, query: str, grid: tuple[int, int]) -> None:
    model = enliven(PlainViT(Packed(WAYS[way]), Packed(WAYS[way]), grid=grid)).eval()
    images = torch.randn(2, 3, grid[0] * 8, grid[1] * 8)
    recorder = AttentionRecorder(model, query=query, verify=True)
    (attention,) = recorder(images)
    assert "attn_monitor_tests" in recorder.sites(images)[-1].op
    with torch.no_grad():
        model(images)
    expected = LAST["matrix"].mean(2) if query == "mean" else LAST["matrix"][:, :, 0]
    assert float(expected.amax()) * expected.shape[-1] > 1.2
    assert float((attention.rows - expected).abs().amax()) * expected.shape[-1] <= 1e-3
    assert attention.verified_error < 1e-5


def test_unlisted_kernel_that_no_reading_explains_is_refused() -> None:
    model = enliven(PlainViT(Packed(through(bhnd, "bhnd")), Packed(through(secret, "bhnd")))).eval()
    images = torch.randn(2, 3, 32, 48)
    for verify in (True, False):
        with pytest.raises(VerificationError) as caught:
            record_attention(model, images, verify=verify)
        for word in ("layer 1 (blocks.1.attn, attn_monitor_tests.secret", "Layers that can be read: [0]"):
            assert word in str(caught.value)
    assert record_attention(model, images, layers=0)[0].verified_error < 1e-5


def test_kernels_that_are_no_attention_are_let_through() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Packed(through(bhnd, "bhnd"))

        def forward(self, x: Tensor) -> Tensor:
            return gate(self.inner(gate(x, torch.tensor(0.7), 2.0)), x.mean(), 1.0)

    model = enliven(PlainViT(Gated())).eval()
    recorder = AttentionRecorder(model)
    images = torch.randn(2, 3, 32, 48)
    assert [s.name for s in recorder.sites(images)] == ["blocks.0.attn.inner"]
    assert recorder(images)[0].verified_error < 1e-5
