"""A recording leaves no trace that training could see."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attn_monitor.capture import record_attention
from attn_monitor.errors import ForwardError
from attn_monitor.isolation import isolated_forward
from tests.helpers import tiny_vit
from tests.styles import Block, MemEffAttention, PlainViT
from tests.zoo import timm_vit

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


class Restless(PlainViT):
    """Does what models do to themselves while they run: statistics, counters, caches, random numbers of all kinds."""

    def __init__(self) -> None:
        super().__init__(MemEffAttention(), MemEffAttention())
        self.statistics = nn.BatchNorm1d(25)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.cache = torch.ones(3)
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        x = self.statistics(self.dropout(self.patch_embed(images)))
        for block in self.blocks:
            x = block(x)
        return x


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that must be the same before and after."""
    generator: Any = np.random.get_state()  # noqa: NPY002
    return {
        "weights": {n: (p.clone(), p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b.clone()) for n, b in model.named_buffers()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "torch": torch.get_rng_state(),
        "numpy": (generator[1], generator[2]),
        "python": random.getstate(),
        "flags": (
            torch.is_grad_enabled(),
            torch.is_autocast_cache_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
        ),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b


def mixed_modes(model: nn.Module) -> nn.Module:
    """Training, but for a frozen part in eval mode: what one root flag would not bring back."""
    model.train()
    model.blocks[0].eval()
    model.patch_embed.requires_grad_(False)
    return model


@pytest.mark.parametrize("layers", [0, "all"])
def test_nothing_changes(layers: Any) -> None:
    model = mixed_modes(Restless())
    before = state(model)
    for _ in range(2):
        record_attention(model, IMAGES, layers=layers, query="mean")
    after = state(model)
    for key in before:
        assert same(before[key], after[key]), key
    model(IMAGES)
    assert not same(after, state(model)), "the comparison sees what an ordinary forward does"


def test_nothing_changes_when_the_model_fails() -> None:
    class Failing(Restless):
        def forward(self, images: Tensor) -> Tensor:
            super().forward(images)
            raise RuntimeError("broken")

    model = mixed_modes(Failing())
    before = state(model)
    with pytest.raises(ForwardError, match="RuntimeError: broken"):
        record_attention(model, IMAGES)
    assert same(before, state(model))


def test_training_goes_on_bit_identically() -> None:
    def train(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = timm_vit("vit_tiny_patch16_224", proj_drop_rate=0.2)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                if watched:
                    record_attention(model, IMAGES, layers="all")
                loss = model(torch.randn(2, 3, 32, 48)).square().mean()
                if watched:
                    record_attention(model, IMAGES)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    for plain, watched in zip(train(False), train(True), strict=True):
        assert torch.equal(plain, watched)


def test_a_cache_filled_by_the_probe_can_be_trained_with() -> None:
    """Tensors made in inference mode would poison it."""

    class Caching(Block):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.linspace(0, 1, x.shape[1])[:, None]
            return super().forward(x * self.table)

    model = PlainViT()
    model.blocks.append(Caching(MemEffAttention()))
    record_attention(model, IMAGES)
    model(IMAGES).sum().backward()
    assert model.patch_embed.proj.weight.grad is not None


def test_modes_inside() -> None:
    model = mixed_modes(Restless())
    with isolated_forward(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()


def test_training_finds_no_gradient_free_cast_in_the_autocast_cache() -> None:
    """Recorded inside the user's own autocast block, before a training step in the same block.

    Newer releases of PyTorch keep such casts out of the cache themselves; the switch is for the older ones.
    """
    model, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    with isolated_forward(model):
        assert not torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record_attention(model, images)
        model(images).square().mean().backward()
        assert torch.is_autocast_cache_enabled()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
