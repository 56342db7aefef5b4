"""The first look takes no more memory than a forward of the images that run together, and is halved as any snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, record_attention
from attn_monitor.capture import noise_look
from attn_monitor.capture.observe import random_projections
from attn_monitor.capture.observe.isolation import is_isolated
from attn_monitor.capture.observe.kinds import attention_product
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.token_places import ablating_observer, traced_products
from attn_monitor.probe.probe_batch import ProbeBatch
from tests.support.helpers import tiny_vit
from tests.support.live_bytes import LiveBytes
from tests.support.tiers import sweep


@contextmanager
def attention(fused: bool) -> Iterator[None]:
    """timm's attention in this form."""
    set_fused_attn(fused)
    try:
        yield
    finally:
        set_fused_attn(True)


def vit(size: int, fused: bool, depth: int = 3) -> nn.Module:
    with attention(fused):
        return tiny_vit(img_size=size, patch_size=8, embed_dim=96, depth=depth, num_heads=6).eval()


@contextmanager
def counted() -> Iterator[LiveBytes]:
    """Counts what is alive on the model's device while it runs: what goes to the host is counted apart."""
    bytes_alive, original = LiveBytes(while_true=is_isolated), random_projections.off_device

    def off_device(x: Tensor) -> Tensor:
        moved = original(x).clone()
        bytes_alive.count_apart(moved)
        return moved

    with ExitStack() as stack:
        for module in (noise_look, ablating_observer, traced_products, attention_product):
            stack.enter_context(mock.patch.object(module, "off_device", off_device))
        yield stack.enter_context(bytes_alive)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@pytest.mark.parametrize("images", sweep([4, 1], quick=1))
def test_the_first_look_takes_what_a_forward_takes(fused: bool, images: int) -> None:
    """On the model's device below 1.2 × a forward of one image, or of the few that run together."""
    model, probe = vit(160, fused), torch.randn(images, 3, 160, 160)
    with torch.no_grad(), LiveBytes() as plain:
        model(probe)
    recorder = AttentionRecorder(model)
    with counted() as look:
        recorder.check(probe)
    assert 0.5 * plain.peak < look.peak < 1.2 * plain.peak
    tokens = 20 * 20 + 1
    assert look.peak_apart < 12e3 * 3 * tokens  # of each token in each layer, and off the device
    with counted() as record:
        recorder(probe)
    assert record.peak < 1.2 * plain.peak


def short_of_memory(images: int, error: Exception) -> nn.Module:
    """Has room for this many images at once."""
    model = tiny_vit()

    def fill(_: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > images:
            raise error

    model.register_forward_pre_hook(fill)
    return model


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["CUDA", "CPU"])
def test_the_first_look_is_halved_until_it_fits(error: Exception) -> None:
    """One image at a time fits, so the maps are those of a model with memory for all of them."""
    probe = ProbeBatch(torch.randn(8, 3, 32, 32))
    model = short_of_memory(1, error)
    monitor = AttentionMonitor(probe, layers="all")
    monitor.check({"student": model})
    assert monitor.images_at_a_time == 1
    rows = monitor.snapshot({"student": model}, step=0).rows("student")
    whole = AttentionMonitor(probe, layers="all").snapshot({"student": _without_hooks(model)}, step=0).rows("student")
    torch.testing.assert_close(rows, whole, atol=1e-3, rtol=1e-3)


def test_a_first_look_without_memory_for_one_image_ends() -> None:
    monitor = AttentionMonitor(ProbeBatch(torch.randn(8, 3, 32, 32)))
    with pytest.raises(torch.OutOfMemoryError):
        monitor.check({"student": short_of_memory(0, CUDA)})


def _without_hooks(model: nn.Module) -> nn.Module:
    plain = tiny_vit()
    plain.load_state_dict(model.state_dict())
    return plain


class HeadsFirst(nn.Module):
    """Heads before images: in one dimension, or in two."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.folded, self.qkv, self.proj = folded, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 3, 0, 1, 4)  # (H, B, N, D)
        if self.folded:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        y = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        return self.proj(y.reshape(4, *x.shape[:2], 8).permute(1, 2, 0, 3).flatten(2))


@pytest.mark.parametrize("folded", [True, False])
def test_one_image_is_read_as_many_are(folded: bool) -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.attn = HeadsFirst(folded)
    images = torch.randn(3, 3, 32, 32)
    alone = record_attention(model, images[:1], layers="all")
    together = record_attention(model, images, layers="all")
    for one, many in zip(alone, together, strict=True):
        torch.testing.assert_close(one.rows, many.rows[:1], atol=1e-5, rtol=1e-4)
        assert (
            (one.places, one.num_prefix, one.mixed) == (many.places, many.num_prefix, many.mixed) == ("exact", 1, False)
        )


class KeptWeights(nn.Module):
    """A gate that looks like attention and never meets a V, and weights of which a copy is used."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * 8**-0.5).softmax(-1).clone()
        weights[..., 1, :] *= 0.5  # in place, after the softmax
        return self.proj((weights @ v).transpose(1, 2).flatten(2)) * x.softmax(-1)


def test_a_copy_of_a_softmax_is_a_softmax_where_it_was_not_changed() -> None:
    model = tiny_vit()
    model.blocks[1].attn = KeptWeights()
    images = torch.randn(2, 3, 32, 32)
    cls, patch = (record_attention(model, images, query=query)[0] for query in ("cls", (0, 0)))
    assert (cls.mixed, cls.kind) == (False, "distribution")
    assert (patch.mixed, patch.kind) == (True, "weights")
