"""What the monitor asks of a device: few transfers, tensors where the model is, and no CUDA where there is none."""

# Annotations are not strings here: custom_op of PyTorch 2.4 wants the types themselves.
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_monitor.attention import on_host, packed, unpacked
from attn_monitor.capture.observe.memory import fetched_once
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.measure.metrics import measure, select_metrics
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.probe_batch import ProbeBatch
from tests.support.styles import Packed, PlainViT, sdpa
from tests.support.zoo import enliven

FETCH = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls that wait for a device; a function mode would see none under a dispatch mode."""
    calls: Counter[str] = Counter()

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return method(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in FETCH:
            patch.setattr(Tensor, name, counting(name, getattr(Tensor, name)))
        yield calls


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


_LENGTHS = torch.arange(0, 25 * 9, 25, dtype=torch.int32)


@torch.library.custom_op("attn_monitor_transfers::packed", mutates_args=())
def kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """Sequences of 25 tokens in one, without a look at their lengths."""
    return softmax(*(t.unflatten(0, (-1, 25)) for t in (q, k, v))).flatten(0, 1).contiguous()


LENGTHS = {count: _LENGTHS[: count + 1].clone() for count in range(1, 9)}
MASKS = {
    count: torch.zeros(25 * count, 25 * count).masked_fill(~torch.block_diag(*torch.ones(count, 25, 25)).bool(), -1e9)
    for count in range(1, 9)
}


def packed_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = LENGTHS[len(q)]
    out: Tensor = kernel(*(t.flatten(0, 1).contiguous() for t in (q, k, v)), lengths, lengths)
    return out.unflatten(0, q.shape[:2])


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    one = [t.flatten(0, 1).transpose(0, 1)[None] for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*one, attn_mask=MASKS[len(q)])
    return out[0].transpose(0, 1).unflatten(0, q.shape[:2])


WAYS = {"sdpa": (sdpa, 0), "softmax": (softmax, 0), "packed": (packed_kernel, 1), "block-diagonal mask": (masked, 1)}


def vit(way: Callable[..., Tensor]) -> PlainViT:
    torch.manual_seed(3)
    return enliven(PlainViT(*(Packed(way) for _ in range(3)))).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", [-1, "all"])
@pytest.mark.parametrize("way", WAYS)
def test_recording_waits_once(way: str, layers: Any) -> None:
    """For the checks of all layers; and once for lengths or a mask that all layers share, if they were not seen yet."""
    recorder = AttentionRecorder(vit(WAYS[way][0]), layers=layers, follow=False)
    recorder(images())
    with counted() as calls:
        recorder(images())
    assert sum(calls.values()) <= 1 + WAYS[way][1], calls


@pytest.mark.parametrize("layers", [-1, "all"])
def test_metrics_wait_once(layers: Any) -> None:
    recorded = AttentionRecorder(vit(sdpa), layers=layers, follow=False)(images())
    with counted() as calls:
        measure({("model", a.layer): a for a in recorded}, {}, metrics=select_metrics(None), threshold=0.6, truth=None)
    assert calls == {"cpu": 1}


def test_rows_of_all_layers_are_copied_together() -> None:
    recorded = AttentionRecorder(vit(sdpa), layers="all", tokens=True, patches=True, follow=False)(images())
    tensors = [tensor for attention in recorded for tensor in attention.tensors.values()]
    tensors += [torch.tensor([True, False, True]), torch.zeros(0), torch.randn(3, 5).double().mT, torch.ones(())]
    data = packed(tensors)
    assert data.ndim == 1
    for before, after in zip(tensors, unpacked(data, tensors), strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert torch.equal(before, after)
    layers = on_host({attention.layer: attention for attention in recorded})
    assert [layers[a.layer].tensors.keys() for a in recorded] == [a.tensors.keys() for a in recorded]


def test_what_was_fetched_is_fetched_again_once_it_is_written_to() -> None:
    fetched = []

    def fetch(x: Tensor) -> list[float]:
        fetched.append(1)
        values: list[float] = x.tolist()
        return values

    once, x = fetched_once(fetch), torch.arange(4.0)
    assert once(x) == once(x) == [0, 1, 2, 3]
    assert len(fetched) == 1
    x += 1
    assert once(x) == [1, 2, 3, 4]
    assert once(x.view(2, 2)) == [[1, 2], [3, 4]]
    for _ in range(8):  # memory that is freed and used again
        assert once(torch.full((4,), float(len(fetched)))) == [len(fetched) - 1] * 4
    with torch.inference_mode():
        y = torch.zeros(2)
        assert once(y) == [0, 0]
        y += 1
        assert once(y) == [1, 1]


def test_cuda_is_not_touched_where_it_was_not_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise AssertionError("a call of torch.cuda")

    model = vit(sdpa)
    monitor = AttentionMonitor(ProbeBatch(images(), mean=(0, 0, 0), std=(1, 1, 1)), layers="all")
    allowed = ("is_initialized", "is_available", "_is_in_bad_fork")  # they start nothing
    for name, function in [*vars(torch.cuda).items()]:
        if callable(function) and not isinstance(function, type) and name not in allowed:
            monkeypatch.setattr(torch.cuda, name, fails)
    for step in range(3):
        snapshot = monitor.snapshot({"model": model}, step=step)
    assert len(snapshot.layers) == 3


def test_default_device_of_the_run_is_not_that_of_the_model() -> None:
    """As after ``torch.set_default_device("cuda")`` with a model on the CPU: nothing is made where it happens to be."""
    model, same, there = vit(sdpa), vit(sdpa), images()
    (expected,) = AttentionRecorder(model)(there)
    with torch.device("meta"):
        recorder = AttentionRecorder(same)
        for _ in range(3):
            (seen,) = recorder(there)
        monitor = AttentionMonitor(ProbeBatch(there, mean=(0, 0, 0), std=(1, 1, 1)), layers="all")
        for step in range(3):
            snapshot = monitor.colored(monitor.snapshot({"model": same}, step=step))
    assert torch.equal(seen.rows, expected.rows)
    colors = snapshot.layers["model", 2].colors
    assert colors is not None
    assert colors.any()
