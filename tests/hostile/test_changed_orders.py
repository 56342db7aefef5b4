"""A model whose order of tokens changes while it is watched: maps are those of float64 rows, in the order of now."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from tests.support import styles
from tests.support.oracle import attention_matrices
from tests.support.styles import PlainViT
from tests.support.zoo import enliven

GRID = (4, 6)
CELLS = torch.arange(24)
MIRRORED = CELLS.reshape(GRID).flip(1).flatten()
SIDES = {"left": CELLS, "right": MIRRORED}
SIDE = "left"  # a global that a forward reads


class Ordered(PlainViT):
    """Patches behind the CLS token in an order of the model's own, by every means of which one may think."""

    side = "left"  # as an attribute of the class

    def __init__(self) -> None:
        super().__init__(styles.MemEffAttention(), styles.MemEffAttention())
        self.register_buffer("order", CELLS.clone())
        self.order_parameter = nn.Parameter(CELLS.clone(), requires_grad=False)
        self.register_buffer("matrix", torch.eye(24))
        self.mirrored, self.shift, self.config = False, 0, types.SimpleNamespace(side="left")
        self.listed = CELLS.tolist()
        self.scores = nn.Parameter(torch.linspace(0, 1, 24))

    def reorder(self, x: Tensor) -> Tensor:
        """In the order of the moment."""
        for order in (self.order, self.order_parameter, self.listed, SIDES[self.side]):
            x = x[:, order]
        x = x[:, MIRRORED] if self.config.side == "right" else x
        return self.matrix @ (x[:, MIRRORED] if self.mirrored else x).roll(self.shift, 1)[:, self.scores.argsort()]

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([x[:, :1], self.reorder(x[:, 1:])], 1)
        for block in self.blocks:
            x = block(x)
        return x


def ordered() -> Ordered:
    """With sharp attention, and patches from left to right."""
    torch.manual_seed(0)
    model = Ordered()
    for module in (model.patch_embed, model.blocks):
        enliven(module)
    return model.eval()


def images() -> Tensor:
    """Two of 4 × 6 patches."""
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def mirror(model: nn.Module, x: Tensor) -> Any:
    """A forward that turns images around."""
    return model(x.flip(-1))


def expected(model: nn.Module, order: Tensor, forward: Callable[..., Any] | None = None) -> Tensor:
    """CLS rows (B, H, 24) in float64, with what token t is given put where cell ``order[t]`` is."""
    row = attention_matrices(model, images(), forward or (lambda m, x: m(x)))[-1][:, :, 0, 1:]
    return torch.zeros_like(row).index_copy(-1, order, row)


def off_by(maps: Tensor, wanted: Tensor) -> float:
    """In units of uniform attention."""
    return float((maps.flatten(2).double() - wanted).abs().max()) * 25


def by_recorder(model: nn.Module, forward: Any = None) -> Callable[[], Tensor]:
    recorder = AttentionRecorder(model, forward=forward)
    return lambda: recorder(images())[0].maps


def by_monitor(model: nn.Module, forward: Any = None) -> Callable[[], Tensor]:
    monitor, step = AttentionMonitor(ProbeBatch(images()), forward=forward), iter(range(99))
    return lambda: monitor.snapshot({"backbone": model}, step=next(step)).layers["backbone", 1].maps


def by_function(model: nn.Module, forward: Any = None) -> Callable[[], Tensor]:
    return lambda: record_attention(model, images(), forward=forward)[0].maps


WAYS = [by_recorder, by_monitor, by_function]


def _other_buffer(model: Ordered, _: Any) -> None:
    model.load_state_dict({**model.state_dict(), "order": MIRRORED})


def _buffer_data(model: Ordered, _: Any) -> None:
    model.order.data.copy_(MIRRORED)  # which counts no version


def _float_buffer(model: Ordered, _: Any) -> None:
    model.matrix.copy_(torch.eye(24)[MIRRORED])


def _parameter(model: Ordered, _: Any) -> None:
    model.order_parameter.data = MIRRORED.clone()


def _attribute(model: Ordered, _: Any) -> None:
    model.mirrored = True


def _list(model: Ordered, _: Any) -> None:
    model.listed[:] = MIRRORED.tolist()


def _config(model: Ordered, _: Any) -> None:
    model.config.side = "right"


def _method(model: Ordered, _: Any) -> None:
    model.reorder = lambda x: x[:, MIRRORED]  # type: ignore[method-assign]


def _class_method(model: Ordered, monkeypatch: Any) -> None:
    monkeypatch.setattr(Ordered, "reorder", lambda self, x: x[:, MIRRORED])


def _class_attribute(model: Ordered, monkeypatch: Any) -> None:
    monkeypatch.setattr(Ordered, "side", "right")


def _global_table(model: Ordered, monkeypatch: Any) -> None:
    monkeypatch.setitem(SIDES, "left", SIDES["right"])  # which a method reads


def _mirror_tokens(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x[:, 1:][:, MIRRORED]], 1)


def _pre_hook(model: Ordered, _: Any) -> None:
    model.blocks[0].register_forward_pre_hook(lambda module, args: (_mirror_tokens(args[0]),))


def _hook(model: Ordered, _: Any) -> None:
    model.patch_embed.register_forward_hook(lambda module, args, out: _mirror_tokens(out))


def _mirrored_forward(tokens: styles.Tokens, x: Tensor) -> Tensor:
    return _mirror_tokens(styles.Tokens.forward(tokens, x))


def _forward_of_a_part(model: Ordered, _: Any) -> None:
    model.patch_embed.forward = types.MethodType(_mirrored_forward, model.patch_embed)  # type: ignore[method-assign]


CHANGES = [
    _other_buffer, _buffer_data, _float_buffer, _parameter, _attribute, _list, _config, _method, _class_method,
    _class_attribute, _global_table, _pre_hook, _hook, _forward_of_a_part,
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "way"),
    [(change, WAYS[number % 3]) for number, change in enumerate(CHANGES)] + [(CHANGES[0], w) for w in WAYS[1:]],
)
def test_order_that_something_changes(change: Any, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ordered()
    record = way(model)
    assert off_by(record(), expected(model, CELLS)) <= 1e-3
    change(model, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was drawn in an old order
        assert off_by(record(), expected(model, MIRRORED)) <= 1e-3
    assert off_by(record(), expected(model, CELLS)) > 1  # the test can tell


def turned(model: nn.Module, x: Tensor, flip: bool = False) -> Any:
    """A forward that turns images around if it is asked to."""
    return model(x.flip(-1) if flip else x)


def _with_keyword(flip: bool) -> Any:
    return lambda m, x, *, flip=flip: turned(m, x, flip)


def _with_default(flip: bool) -> Any:
    return lambda m, x, flip=flip: turned(m, x, flip)


def _with_closure(flip: bool) -> Any:
    return lambda m, x: turned(m, x, flip)


def _partial(flip: bool) -> Any:
    return functools.partial(turned, flip=flip)


@pytest.mark.parametrize("made", [_with_keyword, _with_default, _with_closure, _partial])
def test_forwards_that_differ_in_what_they_were_made_with(made: Any) -> None:
    model = ordered()
    for flip in (False, True, False):
        (attention,) = record_attention(model, images(), forward=made(flip))
        wanted = expected(model, MIRRORED if flip else CELLS, made(flip))
        assert off_by(attention.maps, wanted) <= 1e-3


class Turning:
    """A forward with a state of its own, as an object and as a method."""

    def __init__(self) -> None:
        self.flip = False

    def __call__(self, model: nn.Module, x: Tensor) -> Any:
        return turned(model, x, self.flip)

    def method(self, model: nn.Module, x: Tensor) -> Any:
        return turned(model, x, self.flip)


class TurningModule(nn.Module):
    """The module around a backbone, whose method is the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.flip = False

    def method(self, model: nn.Module, x: Tensor) -> Any:
        return turned(model, x, self.flip)


def by_global(model: nn.Module, x: Tensor) -> Any:
    """A forward that reads a global."""
    return turned(model, x, SIDE == "right")


def _object() -> tuple[Any, Callable[[], None]]:
    turning = Turning()
    return turning, lambda: setattr(turning, "flip", True)


def _bound() -> tuple[Any, Callable[[], None]]:
    turning = Turning()
    return turning.method, lambda: setattr(turning, "flip", True)


def _module_method() -> tuple[Any, Callable[[], None]]:
    turning = TurningModule()
    return turning.method, lambda: setattr(turning, "flip", True)


def _module_in_closure() -> tuple[Any, Callable[[], None]]:
    turning = TurningModule()
    return lambda m, x: turning.method(m, x), lambda: setattr(turning, "flip", True)


def _partial_of_an_object() -> tuple[Any, Callable[[], None]]:
    turning = Turning()
    return functools.partial(turning), lambda: setattr(turning, "flip", True)


def _cell() -> tuple[Any, Callable[[], None]]:
    flip = False

    def change() -> None:
        nonlocal flip
        flip = True

    return lambda m, x: turned(m, x, flip), change


def _settings() -> tuple[Any, Callable[[], None]]:
    settings = {"flip": False}
    return lambda m, x: turned(m, x, settings["flip"]), lambda: settings.update(flip=True)


def _global() -> tuple[Any, Callable[[], None]]:
    return by_global, lambda: globals().update(SIDE="right")


@pytest.mark.parametrize(
    "made", [_object, _bound, _module_method, _module_in_closure, _partial_of_an_object, _cell, _settings, _global]
)
def test_forward_of_which_something_changes(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SIDE", "left")  # put back afterwards
    model, (forward, change) = ordered(), made()
    recorder = AttentionRecorder(model, forward=forward)
    assert off_by(recorder(images())[0].maps, expected(model, CELLS, forward)) <= 1e-3
    change()
    for maps in (recorder(images())[0].maps, record_attention(model, images(), forward=forward)[0].maps):
        assert off_by(maps, expected(model, MIRRORED, forward)) <= 1e-3


def test_callable_objects_that_hold_each_other() -> None:
    """As operations of libraries do: what is held is followed once."""

    class Operation:
        other: object = None

        def __call__(self) -> None:
            pass

    model: Any = PlainViT(styles.MemEffAttention()).eval()
    model.one, model.packet = Operation(), torch.ops.aten.add
    model.one.other = Operation()
    model.one.other.other = model.one
    recorder, images = AttentionRecorder(model), torch.randn(2, 3, 32, 48)
    (first,), (second,) = recorder(images), recorder(images)
    assert torch.equal(first.rows, second.rows)
