"""A recording leaves no trace that training could see."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.isolation import isolated_forward
from attn_monitor.capture.recorder import record_attention
from attn_monitor.errors import ForwardError
from tests.support.helpers import tiny_vit
from tests.support.styles import Block, MemEffAttention, PlainViT
from tests.support.zoo import timm_vit

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


class Keeps(PlainViT):
    """Runs something of its own in every forward."""

    def __init__(self, prepare: Callable[[Any], None], run: Callable[[Any, Tensor], None]) -> None:
        super().__init__(MemEffAttention())
        prepare(self)
        self.own = run

    def forward(self, images: Tensor) -> Tensor:
        self.own(self, images)
        return super().forward(images)


def late_buffer(model: Any, images: Tensor) -> None:
    model.late = torch.ones(images.shape[-1])


def added_buffer(model: Any, images: Tensor) -> None:
    model.register_buffer("added", torch.ones(images.shape[-1]), persistent=False)


def removed_buffer(model: Any, images: Tensor) -> None:
    if hasattr(model, "gone"):
        del model.gone


def table_and_its_size(model: Any, images: Tensor) -> None:
    """Rotary tables as Hugging Face keeps them: made anew only when the images are larger than ever."""
    if images.shape[-1] > model.largest:
        model.largest = images.shape[-1]
        model.register_buffer("table", torch.ones(images.shape[-1]), persistent=False)
    assert len(model.table) >= images.shape[-1]


def through_data(model: Any, images: Tensor) -> None:
    model.centre.data.add_(1)
    model.numbers.numpy()[:] += 1


def in_inference_mode(model: Any, images: Tensor) -> None:
    with torch.inference_mode():
        model.frozen.add_(1)


def shared_and_expanded(model: Any, images: Tensor) -> None:
    model.part.mul_(2)
    model.seed.add_(1)


def attributes(model: Any, images: Tensor) -> None:
    model.cache, model.new = torch.ones(images.shape[-1]), images
    model.losses.append(images.mean())
    model.by_size[tuple(images.shape)] = 1
    model.calls += 1
    del model.old


def late_modules(model: Any, images: Tensor) -> None:
    model.head = nn.Linear(images.shape[-1], 2)
    model.blocks.append(nn.Identity())


def make_shared(model: Any) -> None:
    whole = torch.arange(6.0)
    for name, value in {"whole": whole, "part": whole[:3], "seed": torch.ones(1)}.items():
        model.register_buffer(name, value)
    model.register_buffer("wide", model.seed.expand(4))


def make_attributes(model: Any) -> None:
    model.cache, model.losses, model.by_size, model.calls, model.old = None, [], {}, 0, torch.ones(2)


def make_frozen(model: Any) -> None:
    with torch.inference_mode():
        model.register_buffer("frozen", torch.zeros(3))


def make_table(model: Any) -> None:
    model.largest = 8
    model.register_buffer("table", torch.ones(8), persistent=False)


KEEPS: dict[str, tuple[Callable[[Any], None], Callable[[Any, Tensor], None]]] = {
    "None is filled": (lambda m: m.register_buffer("late", None), late_buffer),
    "None, not persistent": (lambda m: m.register_buffer("late", None, persistent=False), late_buffer),
    "added": (lambda m: None, added_buffer),
    "removed": (lambda m: m.register_buffer("gone", torch.ones(2), persistent=False), removed_buffer),
    "table and its size": (make_table, table_and_its_size),
    "written through data": (
        lambda m: (m.register_buffer("centre", torch.zeros(2)), m.register_buffer("numbers", torch.zeros(2))),
        through_data,
    ),
    "inference mode": (make_frozen, in_inference_mode),
    "shared and expanded": (make_shared, shared_and_expanded),
    "attributes": (make_attributes, attributes),
    "modules": (lambda m: None, late_modules),
}


def bound(model: nn.Module) -> list[Any]:
    """What every module's attributes and tables are, by identity, and the values of tensors."""
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            items = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
            found += [(name, id(value)), *((name, key, id(item)) for key, item in items.items())]
            tensors = [v for v in (value, *items.values()) if isinstance(v, Tensor)]
            found += [t.detach().clone().numpy().tolist() for t in tensors]
        found.append(sorted(module._non_persistent_buffers_set))
    return found


@pytest.mark.parametrize("name", KEEPS)
def test_what_a_module_keeps_is_as_before(name: str) -> None:
    """Buffers and attributes that belong together, however they are written, and whatever the forward makes of them."""
    model = Keeps(*KEEPS[name])
    before = bound(model)
    record_attention(model, IMAGES)
    assert bound(model) == before
    model(IMAGES)
    assert bound(model) != before, "the comparison sees what an ordinary forward does"


def test_a_backward_that_waits_for_a_buffer_is_not_disturbed() -> None:
    """A recording between forward and backward, of a model that writes to its buffers in training only."""

    class Scaled(PlainViT):
        def __init__(self) -> None:
            super().__init__(MemEffAttention())
            self.register_buffer("scale", torch.ones(1))

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images * self.scale)

    model = Scaled()
    loss = model(IMAGES.clone().requires_grad_()).sum()
    record_attention(model, IMAGES)
    loss.backward()
    assert model.patch_embed.proj.weight.grad is not None


def test_a_cache_made_while_recording_is_not_what_training_finds() -> None:
    """It would have the probe's size; and training can go on with the one it makes itself."""

    class Caching(Block):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.linspace(0.5, 1, x.shape[1])[:, None]
            return super().forward(x * self.table)

    model = PlainViT()
    model.blocks.append(Caching(MemEffAttention()))
    record_attention(model, IMAGES)
    assert model.blocks[-1].table is None
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


class HooksItselfOnFirstUse(nn.Module):
    """As Transformers does to collect hidden states: hooked once, and marked as hooked."""

    hooked = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.collected: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.inner.register_forward_pre_hook(lambda _, args: None)
            self.inner.register_forward_hook(lambda _, args, out: self.collected.append(out))
            self.hooked = True
        self.collected.clear()
        out: Tensor = self.inner(x)
        assert len(self.collected) == 1, f"hooked {len(self.collected)} times"
        return out


def test_hooks_and_their_mark_stay_together() -> None:
    model = HooksItselfOnFirstUse()
    for _ in range(3):
        with isolated_forward(model):
            model(torch.zeros(1, 4))
        assert not model.hooked
        assert not model.inner._forward_hooks
        assert not model.inner._forward_pre_hooks
    model(torch.zeros(1, 4))
    with isolated_forward(model):
        model(torch.zeros(1, 4))
    assert model.hooked
    assert len(model.inner._forward_hooks) == len(model.inner._forward_pre_hooks) == 1
