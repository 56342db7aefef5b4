"""Kernels are called in many ways: into memory of the caller, into q itself, with lists, within other functions.

Some of them are no attention: rotary embeddings, sums, scans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_monitor.capture.observe.kinds.kernels import kernel_call
from attn_monitor.capture.observe.kinds.kind import Operation
from attn_monitor.capture.observe.observation import RefusedObservation
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.errors import NoAttentionError, VerificationError
from tests.hostile.test_gpu_kernels import error, images, vit
from tests.support.gpu_kernels import FlashAttention, FlashAttentionVarlen, Way, fa2, matrices_of, rule, sdpa, unseen
from tests.support.styles import HEADS, Packed, PlainViT
from tests.support.zoo import enliven

_library = torch.library.Library("attn_monitor_calls", "DEF")


def defined(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, function, "CPU")
    operation: Callable[..., Any] = getattr(torch.ops.attn_monitor_calls, name)
    return operation


def statistics(q: Tensor) -> Tensor:
    return torch.zeros(q.shape[0], q.shape[2], q.shape[1])


def into(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    out.copy_(rule(q, k, v))


_out_last = defined(
    "out_last(Tensor query, Tensor key, Tensor value, Tensor(a!) out) -> ()", lambda q, k, v, o: into(o, q, k, v)
)
_out_first = defined("out_first(Tensor(a!) out, Tensor a, Tensor b, Tensor c) -> ()", into)
_in_place = defined("in_place(Tensor(a!) q, Tensor k, Tensor v) -> ()", lambda q, k, v: into(q, q, k, v))
_second = defined(
    "second(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", lambda q, k, v: (statistics(q), rule(q, k, v))
)
_list = defined("list(Tensor q, Tensor k, Tensor v) -> Tensor[]", lambda q, k, v: [rule(q, k, v), statistics(q)])
_named = defined(
    "named(Tensor q, Tensor k, Tensor v, *, float? scale=None, bool causal=False) -> Tensor",
    lambda q, k, v, scale=None, causal=False: rule(q, k, v, scale=scale, causal=causal),
)
_random = defined("random(Tensor q, Tensor k, Tensor v) -> Tensor", lambda q, k, v: (torch.rand(3), rule(q, k, v))[1])
_cross = defined(
    "cross(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k) -> Tensor",
    lambda q, k, v, *_: v + v.mean(0),
)
_factor = defined("factor(Tensor q, Tensor k, Tensor v, float s) -> Tensor", lambda q, k, v, s: rule(q, k, v, scale=s))


def with_memory(call: Callable[..., Any], out_first: bool) -> Way:
    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        call(*((out, q, k, v) if out_first else (q, k, v, out)))
        return out

    return way


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    _in_place(q, k, v)
    return q


class Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return FlashAttention.apply(q, k, v, None, False)


class AroundSDPA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)


class AroundSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rule(q, k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
        return out


class Starred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        return statistics(args[0]), unseen(*args[:3])


class Derived(FlashAttention):
    """Has no forward of its own."""


class Tutorial(torch.autograd.Function):
    """Triton's tutorial: (B, H, N, D), and options that are not attention's."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, sm_scale: float, warp: bool = True) -> Tensor:
        out = unseen(*(t.transpose(1, 2) for t in (q, k, v)), scale=sm_scale, causal=causal)
        return out.transpose(1, 2).contiguous()


tutorial = Tutorial.apply


WAYS: dict[str, Way] = {
    "into memory": with_memory(_out_last, out_first=False),
    "into memory that comes first": with_memory(_out_first, out_first=True),
    "into q": in_place,
    "statistics come first": lambda q, k, v: _second(q, k, v)[1],
    "a list": lambda q, k, v: _list(q, k, v)[0],
    "by name": lambda q, k, v: _named(v=v, scale=0.7, k=k, q=q, causal=True),
    "function within a function": lambda q, k, v: Outer.apply(q, k, v),
    "function around sdpa": lambda q, k, v: AroundSDPA.apply(q, k, v),
    "function around a softmax": lambda q, k, v: AroundSoftmax.apply(q, k, v),
    "function of any arguments": lambda q, k, v: Starred.apply(q, k, v, None, 3)[1],
    "function with an inherited forward": lambda q, k, v: Derived.apply(q, k, v, None, False),
    "Triton's tutorial": lambda q, k, v: tutorial(
        *(t.transpose(1, 2).contiguous() for t in (q, k, v)), True, 0.5, False
    ).transpose(1, 2),
    "checkpoint": lambda q, k, v: checkpoint(FlashAttention.apply, q, k, v, None, False, use_reentrant=False),
    "values of another width": lambda q, k, v: fa2(q, k, v[..., :4].contiguous()).repeat(1, 1, 1, 2),
    "narrow queries": lambda q, k, v: fa2(q[..., :4].contiguous(), k[..., :4].contiguous(), v),
    "one head of keys": lambda q, k, v: fa2(q, k[:, :, :1].contiguous(), v[:, :, :1].contiguous()),
    "strided": lambda q, k, v: fa2(*torch.stack([q, k, v], 3).unbind(3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_call_is_read(way: str) -> None:
    model = vit(sdpa, WAYS[way])
    truth = matrices_of(model, images())
    for layer, seen in enumerate(record_attention(model, images(), layers="all")):
        assert seen.layer == layer
        assert error(seen.rows, truth[layer][:, :, 0]) < 1e-3


def test_function_that_writes_into_q_is_refused() -> None:
    """Nothing says beforehand that it will, so its queries are lost."""

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            np.copyto(q.numpy(), rule(q, k, v).numpy())
            ctx.mark_dirty(q)
            return q

    model = vit(sdpa, lambda q, k, v: Overwriting.apply(q.clone(), k, v))
    with pytest.raises(VerificationError, match=r"layer 1 \(blocks\.1\.attn, .*Overwriting\)"):
        record_attention(model, images())


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    for t in (q, k):
        half = t.shape[-1] // 2
        t.copy_(t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin)


def rotated(call: Callable[..., Any]) -> Way:
    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = (torch.arange(q.shape[1]).float()[None, :, None, None] * 0.1).expand(q.shape)
        q, k = q.clone(), k.clone()
        call(q, k, angle.cos().contiguous(), angle.sin().contiguous())
        return sdpa(q, k, v)

    return way


def summed(call: Callable[..., Any]) -> Way:
    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sdpa(q, k, v).contiguous()
        changed: Tensor | None = call(out, q, k)
        return out if changed is None else changed

    return way


NONE: dict[str, Way] = {
    "rotary in place": rotated(
        defined("rotary(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()", rotate),
    ),
    "rotary in place that its schema hides": rotated(
        defined("rotary_hidden(Tensor q, Tensor k, Tensor cos, Tensor sin) -> ()", rotate),
    ),
    "sum": summed(defined("sum(Tensor a, Tensor b, Tensor c) -> Tensor", lambda a, b, c: a + b + c)),
    "sum in place": summed(
        defined("sum_(Tensor(a!) a, Tensor b, Tensor c) -> ()", lambda a, b, c: (a.add_(b).add_(c), None)[1])
    ),
}


@pytest.mark.parametrize("way", NONE)
def test_operation_on_three_tensors_is_no_attention(way: str) -> None:
    model = vit(NONE[way], sdpa)
    truth = matrices_of(model, images())
    for layer, seen in enumerate(record_attention(model, images(), layers="all")):
        assert seen.layer == layer
        assert error(seen.rows, truth[layer][:, :, 0]) < 1e-3


def scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A state-space model in its linear form, (B, N, H, D)."""
    state, out = torch.zeros(len(q), HEADS, q.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(q.shape[1]):
        state = 0.9 * state + torch.einsum("bhd,bhe->bhde", k[:, t].double(), v[:, t].double())
        out.append(torch.einsum("bhd,bhde->bhe", q[:, t].double(), state))
    return torch.stack(out, 1).to(q.dtype)


def hidden(x: Tensor) -> Tensor:
    """Copy it as a kernel would that no dispatcher sees."""
    out = torch.empty(x.shape)
    np.copyto(out.numpy(), x.detach().contiguous().numpy())
    return out


class ScanFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return hidden(scan(x, b, c))


class StateSpace(Packed):
    """Of a class of its own, beside attention."""


class TokenMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.over_tokens = nn.Linear(25, 25)

    def forward(self, x: Tensor) -> Tensor:
        return hidden(self.over_tokens(x.mT).mT)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return hidden(self.conv(x.mT).mT)


_scan = defined("scan(Tensor C, Tensor B, Tensor x) -> Tensor", scan)
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "scan": lambda: StateSpace(lambda q, k, v: hidden(scan(q, k, v))),
    "scan, operation": lambda: StateSpace(_scan),
    "scan, function": lambda: StateSpace(lambda q, k, v: ScanFunction.apply(q, k, v)),
    "scan both ways": lambda: StateSpace(
        lambda q, k, v: hidden(scan(q, k, v) + scan(*(t.flip(1) for t in (q, k, v))).flip(1))
    ),
    "MLP-Mixer": TokenMixing,
    "convolution": Convolution,
}


@pytest.mark.parametrize("other", OTHERS)
def test_mixing_in_kernels_that_is_no_attention_is_no_layer(other: str) -> None:
    torch.manual_seed(3)
    hybrid = enliven(PlainViT(Packed(sdpa), OTHERS[other](), Packed(sdpa))).eval()
    sites = AttentionRecorder(hybrid, layers="all").sites(images())
    assert [site.name for site in sites] == ["blocks.0.attn", "blocks.2.attn"]
    assert sites[0].refusal is None
    alone = enliven(PlainViT(OTHERS[other](), OTHERS[other]())).eval()
    with pytest.raises(NoAttentionError, match="If it has attention") as refused:
        record_attention(alone, images())
    assert "blocks" not in str(refused.value)


def test_unseen_attention_beside_a_scan_is_a_layer() -> None:
    torch.manual_seed(3)
    model = enliven(PlainViT(Packed(sdpa), StateSpace(unseen), OTHERS["scan"]())).eval()
    sites = AttentionRecorder(model, layers="all").sites(images())
    assert [(site.name, site.op) for site in sites][1:] == [("blocks.1.attn", "not seen")]


def test_scale_may_be_another_number_in_each_step() -> None:
    """As `logit_scale.exp().item()`: it is read, and the kernel is not examined again."""
    calls = []

    class Scaled(nn.Module):
        scale = 0.5

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            calls.append(1)
            out: Tensor = _factor(q, k, v, self.scale)
            return out

    scaled = Scaled()
    model = vit(sdpa, scaled)
    recorder = AttentionRecorder(model, follow=False)
    recorder(images())
    for scale in (0.3, 0.9, 8**-0.5, 0.8):
        scaled.scale = scale
        truth = matrices_of(model, images())[-1]
        calls.clear()
        (seen,) = recorder(images())
        assert error(seen.rows, truth[:, :, 0]) < 1e-3
        assert len(calls) == 1


def test_examination_leaves_memory_and_random_state() -> None:
    """Also where a kernel writes to its arguments, or to a list of them, or draws random numbers."""
    workspace = torch.zeros(4)

    def used(q: Tensor, k: Tensor, v: Tensor, workspace: list[Tensor]) -> Tensor:
        workspace[0].add_(1)
        return rule(q, k, v)

    call = defined("used(Tensor q, Tensor k, Tensor v, Tensor(a!)[] workspace) -> Tensor", used)
    model = vit(_random, lambda q, k, v: call(q, k, v, [workspace]), in_place)
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    ran = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: ran.append(1))
    record_attention(model, images(), layers="all")
    assert float(workspace[0]) == len(ran) / 3, "it is written to by the model's own calls alone"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_lengths_of_keys_alone_may_differ() -> None:
    """A refusal by name, not a layer that is missing."""

    def uneven(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        even = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
        other = even.clone()
        other[1] -= 5
        out: Tensor = _cross(*(t.flatten(0, 1).contiguous() for t in (q, k, v)), even, other)
        return out.unflatten(0, q.shape[:2])

    sites = AttentionRecorder(vit(sdpa, uneven), layers="all").sites(images())
    assert "packed sequences of 20 to 30 tokens" in str(sites[1].refusal)


@pytest.mark.parametrize("kind", ["operation", "function"])
def test_layer_after_a_kernel_that_is_refused_is_read(kind: str) -> None:
    """A kernel of which no rows are read is ablated like any other."""

    def uneven(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu = torch.tensor([0, *(25 * n + end for n in range(len(q)) for end in (10, 25))], dtype=torch.int32)
        one = [t.flatten(0, 1).contiguous() for t in (q, k, v)]
        varlen = torch.ops.flash_attn._flash_attn_varlen_forward
        if kind == "function":
            out: Tensor = FlashAttentionVarlen.apply(*one, cu, cu)
        else:
            out = varlen(*one, cu, cu, 15, 15, 0.0, 0.4, False)[0]
        return out.unflatten(0, q.shape[:2])

    model = vit(uneven, sdpa)
    first, second = AttentionRecorder(model, layers="all").sites(images())
    assert "packed sequences of 10 to 15 tokens" in str(first.refusal)
    assert second.refusal is None


def test_packed_sequences_that_stop_fitting_are_refused() -> None:
    """What is known of a kernel does not hang on lengths, which are on the device."""
    q, k, v = torch.randn(3, 32, HEADS, 8)
    reasons = []
    for length in (16, 12):
        cu = torch.tensor([0, length, 2 * length], dtype=torch.int32)
        used = (t[: 2 * length].contiguous() for t in (q, k, v))
        out = torch.zeros_like(q)
        call = torch.ops.flash_attn._flash_attn_varlen_forward
        out[: 2 * length] = call(*used, cu, cu, 16, 16, 0.0, 0.4, False)[0]
        attention = kernel_call(Operation(call.default, (q, k, v, cu, cu, 16, 16, 0.0, 0.4, False), {}), [out])
        assert attention is not None
        seen = attention.read(0, verify=True)
        reasons.append(seen.reason if isinstance(seen, RefusedObservation) else "")
    assert reasons[0] == ""
    assert "do not fill" in reasons[1]


def test_a_kernel_with_a_seed_is_examined_once() -> None:
    runs = []

    def seeded(q: Tensor, k: Tensor, v: Tensor, seed: int) -> Tensor:
        runs.append(seed)
        return rule(q, k, v)

    operation = defined("seeded(Tensor q, Tensor k, Tensor v, int seed) -> Tensor", seeded)
    numbers = iter(range(10**6))
    recorder = AttentionRecorder(vit(lambda q, k, v: operation(q, k, v, next(numbers))), follow=False)
    recorder(images())
    runs.clear()
    recorder(images())
    recorder(images())
    assert len(runs) == 2
