"""State that a model keeps anywhere is restored after a recording, or named in one warning."""

from __future__ import annotations

import ctypes
import functools
import io
import itertools
import multiprocessing
import queue
import random
import re
import threading
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback
from attn_monitor.capture.observe import model_state
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from tests.support.helpers import Distillation, loader, trainer
from tests.support.styles import MemEffAttention, PlainViT

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


class Stateful(PlainViT):
    """A ViT that runs something of its own in every forward."""

    def __init__(self, prepare: Callable[[Any], None], change: Callable[[Any], None]) -> None:
        super().__init__(MemEffAttention(), MemEffAttention())
        self.change = change
        prepare(self)

    def forward(self, images: Tensor) -> Tensor:
        self.change(self)
        return super().forward(images)


class Record:
    def __init__(self) -> None:
        self.count, self.seen = 0, [[0]]

    def add(self) -> None:
        self.count += 1
        self.seen[0].append(self.count)


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Forbids(OrderedDict[str, int]):
    """As Transformers' ModelOutput does."""

    def update(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("not to be used")

    clear = update  # type: ignore[assignment]


class Case(NamedTuple):
    prepare: Callable[[Any], None]
    change: Callable[[Any], None]
    read: Callable[[Any], Any]


def sets(**values: Callable[[], Any]) -> Callable[[Any], None]:
    """Give the model these attributes."""
    return lambda model: [setattr(model, name, make()) for name, make in values.items()] and None


def count_in_class(model: Any) -> None:
    type(model).calls = getattr(type(model), "calls", 0) + 1


def rebind_data(model: Any) -> None:
    model.patch_embed.proj.weight.data = model.patch_embed.proj.weight.data * 0.5


def weight(model: Any) -> Any:
    return model.patch_embed.proj.weight.detach().clone()


def normalise(model: Any) -> None:
    parameter = model.patch_embed.proj.weight
    parameter.copy_(nn.functional.normalize(parameter.flatten(1)).reshape(parameter.shape))


CASES: dict[str, Case] = {
    "nested containers": Case(
        sets(a=lambda: {"x": [{"y": [1]}]}), lambda m: m.a["x"][0]["y"].append(2), lambda m: str(m.a)
    ),
    "a list in a tuple": Case(sets(a=lambda: ([1],)), lambda m: m.a[0].append(2), lambda m: str(m.a)),
    "deque and counter": Case(
        sets(a=lambda: deque([1], maxlen=3), b=Counter),
        lambda m: (m.a.append(2), m.b.update("ab")),
        lambda m: (list(m.a), m.a.maxlen, dict(m.b)),
    ),
    "a dict that forbids update": Case(
        sets(a=lambda: Forbids(x=1)), lambda m: m.a.__setitem__("y", 2), lambda m: list(m.a.items())
    ),
    "plain object": Case(sets(a=Record), lambda m: m.a.add(), lambda m: (m.a.count, str(m.a.seen))),
    "object with slots": Case(sets(a=Slotted), lambda m: setattr(m.a, "count", m.a.count + 1), lambda m: m.a.count),
    "torch generator": Case(
        sets(a=torch.Generator), lambda m: torch.rand(1, generator=m.a), lambda m: m.a.get_state().tolist()
    ),
    "numpy generator": Case(
        sets(a=lambda: [np.random.default_rng(0)]), lambda m: m.a[0].random(), lambda m: str(m.a[0].bit_generator.state)
    ),
    "numpy random state": Case(
        sets(a=lambda: np.random.RandomState(0)),
        lambda m: m.a.rand(),
        lambda m: str(m.a.get_state()),
    ),
    "python generator": Case(sets(a=random.Random), lambda m: m.a.random(), lambda m: m.a.getstate()),
    "array in place": Case(
        sets(a=lambda: {"x": np.zeros(3)}), lambda m: m.a["x"].__iadd__(1), lambda m: m.a["x"].tolist()
    ),
    "tensor in place": Case(sets(a=lambda: [torch.zeros(3)]), lambda m: m.a[0].data.add_(1), lambda m: m.a[0].tolist()),
    "class attribute": Case(sets(), count_in_class, lambda m: getattr(type(m), "calls", None)),
    "module in a list": Case(
        sets(a=lambda: [nn.BatchNorm2d(3)]), lambda m: m.a[0](IMAGES), lambda m: m.a[0].running_mean.clone()
    ),
    "average in a list": Case(
        sets(a=lambda: [nn.Linear(2, 2)]),
        lambda m: m.a[0].weight.lerp_(torch.ones(2, 2), 0.1),
        lambda m: m.a[0].weight + 0,
    ),
    "bound method": Case(
        lambda m: setattr(m, "a", Record().add), lambda m: m.a(), lambda m: (m.a.__self__.count, str(m.a.__self__.seen))
    ),
    "partial": Case(
        lambda m: setattr(m, "a", functools.partial(list.append, [])), lambda m: m.a(1), lambda m: list(m.a.args[0])
    ),
    "value shared by processes": Case(
        sets(a=lambda: multiprocessing.Value("i", 3)),
        lambda m: setattr(m.a, "value", m.a.value + 1),
        lambda m: m.a.value,
    ),
    "C value": Case(
        sets(a=lambda: ctypes.c_int(3)), lambda m: setattr(m.a, "value", m.a.value + 1), lambda m: m.a.value
    ),
    "value of a thread": Case(
        lambda m: (setattr(m, "a", threading.local()), setattr(m.a, "n", 0)),
        lambda m: setattr(m.a, "n", m.a.n + 1),
        lambda m: m.a.n,
    ),
    "array of objects": Case(
        sets(a=lambda: np.array([0, None], dtype=object)), lambda m: m.a.__setitem__(1, [m.a[1]]), lambda m: str(m.a)
    ),
    "weight normalised": Case(sets(), normalise, weight),
    "weight clamped through data": Case(sets(), lambda m: m.patch_embed.proj.weight.data.clamp_(-0.01, 0.01), weight),
    "weight decayed through a view": Case(sets(), lambda m: m.patch_embed.proj.weight.view(-1).mul_(0.9), weight),
    "weights decayed together": Case(
        sets(), lambda m: torch._foreach_mul_(list(m.patch_embed.proj.parameters()), 0.9), weight
    ),
    "weight bound to other data": Case(sets(), rebind_data, weight),
    "weight frozen": Case(
        sets(),
        lambda m: m.patch_embed.proj.weight.requires_grad_(False),
        lambda m: m.patch_embed.proj.weight.requires_grad,
    ),
}


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("name", CASES)
def test_restored(name: str) -> None:
    """After the first look, after a recording of the last layer, and after one of all layers."""
    case = CASES[name]
    model = Stateful(case.prepare, case.change)
    before = case.read(model)
    last, every = AttentionRecorder(model), AttentionRecorder(model, layers="all")
    for record in (last, last, every):
        record(IMAGES)
        assert equal(case.read(model), before)
    with torch.no_grad():
        model(IMAGES)
    assert not equal(case.read(model), before), "the comparison sees what an ordinary forward does"


def test_restored_after_a_failure() -> None:
    def change(model: Any) -> None:
        normalise(model)
        model.a["x"].append(1)
        raise RuntimeError("broken")

    model = Stateful(sets(a=lambda: {"x": []}), change)
    before = weight(model)
    for _ in range(2):
        with pytest.raises(Exception, match="broken"):
            record_attention(model, IMAGES)
        assert torch.equal(weight(model), before)
        assert model.a == {"x": []}


def test_what_a_thread_fills_is_left_alone() -> None:
    """An object that holds a lock is shared with a thread, whose items must not be taken back."""

    class Queue:
        def __init__(self) -> None:
            self.lock, self.items = threading.Lock(), [0]

    model = Stateful(sets(a=Queue), lambda m: m.a.items.append(1))
    with pytest.warns(UserWarning, match=r"Stateful\.a.*cannot be restored"):
        record_attention(model, IMAGES)
    assert len(model.a.items) > 1


LOST: dict[str, Case] = {
    "cache": Case(sets(a=lambda: functools.lru_cache(4)(torch.zeros)), lambda m: m.a(len(str(m))), lambda m: None),
    "stream": Case(sets(a=io.BytesIO), lambda m: m.a.write(b"x"), lambda m: None),
    "queue": Case(sets(a=queue.SimpleQueue), lambda m: m.a.put(1), lambda m: None),
    "iterator": Case(sets(a=lambda: iter(range(10**6))), lambda m: next(m.a), lambda m: None),
    "large array": Case(sets(a=lambda: np.zeros(10**5)), lambda m: m.a.__iadd__(1), lambda m: None),
    "large tensor": Case(sets(a=lambda: torch.zeros(10**5)), lambda m: m.a.add_(1), lambda m: None),
}


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_restored_is_one_warning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_state, "_LARGEST_COPIES", 10**5)
    model = Stateful(LOST[name].prepare, LOST[name].change)
    with pytest.warns(UserWarning, match=r"Stateful\.a.*cannot be restored.*forward=") as caught:
        record_attention(model, IMAGES)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record_attention(model, IMAGES)


def test_a_parameter_first_written_to_later_is_named_and_then_restored() -> None:
    def change(model: Any) -> None:
        if model.late:
            normalise(model)

    model = Stateful(sets(late=lambda: False), change)
    record_attention(model, IMAGES)
    model.late = True
    with pytest.warns(UserWarning, match=r"parameter patch_embed\.proj\.weight"):
        record_attention(model, IMAGES)
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(3)
    before = weight(model)
    record_attention(model, IMAGES)
    assert torch.equal(weight(model), before)


def test_an_iterator_that_is_not_used_raises_no_warning() -> None:
    model = Stateful(sets(a=lambda: itertools.count()), lambda m: None)
    record_attention(model, IMAGES)
    assert next(model.a) == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_is_run_and_left_alone() -> None:
    """Its tables are views of what TorchScript keeps."""
    model = PlainViT(MemEffAttention(), MemEffAttention())
    model.patch_embed = torch.jit.script(model.patch_embed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record_attention(model, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class LogsInForward(Distillation):
    """Is a model itself, and logs in its forward; its backbone keeps an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.student_backbone.draws = iter(range(10**6))
        self.student_backbone.register_forward_pre_hook(lambda m, args: next(m.draws) and None)

    def forward(self, images: Tensor) -> Tensor:
        self.log("mean", images.mean())
        return self.student_backbone(images)


def test_the_probe_logs_nothing_of_the_models_own(tmp_path: Path) -> None:
    """Neither at the end of training, where Lightning forbids it; and what cannot be restored is told once, by us."""
    running = trainer(tmp_path, AttentionMapCallback(targets={"model": ""}, every_n_train_steps=1), max_steps=3)
    with pytest.warns(UserWarning, match="AttentionMapCallback") as caught:
        running.fit(LogsInForward(), loader())
    ours = [str(w.message) for w in caught if "AttentionMapCallback" in str(w.message)]
    assert len(ours) == 1
    assert re.search(r"AttentionMapCallback: .*\.draws when it runs, which cannot be restored", ours[0])
    assert "mean" not in running.logged_metrics
