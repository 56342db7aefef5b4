"""Attention in the less usual ways that people write it: right against float64, or refused for its reason."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, record_attention
from attn_monitor.attention import LayerAttention
from attn_monitor.capture.observe.kinds.fused import FusedCall
from attn_monitor.errors import AttentionError, ForwardError, NoAttentionError, QueryError, UnsupportedAttentionError
from attn_monitor.probe.probe_batch import ProbeBatch
from tests.support.helpers import tiny_vit
from tests.support.releases import TORCH, since_torch

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
SCALE = 8**-0.5
Attend = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Four heads of eight channels, whose product ``attend`` writes in its own way."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.qkv, self.proj = attend, nn.Linear(32, 96), nn.Linear(32, 32)
        self.sink = nn.Parameter(torch.randn(4) + 4)
        nn.init.normal_(self.qkv.weight, std=0.4)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(self, q, k, v).transpose(1, 2).flatten(2))


def vit(attend: Attend) -> nn.Module:
    torch.manual_seed(3)
    model = tiny_vit().eval()
    for block in model.blocks:
        block.attn = Attention(attend)
    return model.requires_grad_(False)


@torch.no_grad()
def truth(model: nn.Module, weights: Callable[[Attention, Tensor, Tensor], Tensor]) -> Tensor:
    """The matrix of the last layer in float64, (B, H, Q, K), from what enters it."""
    model, found = model.double(), list[Tensor]()
    attention = model.blocks[-1].attn

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        q, k, _ = attention.qkv(args[0]).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        found.append(weights(attention, q, k))

    with attention.register_forward_pre_hook(keep):
        model(IMAGES.double())
    model.float()
    return found[-1]


def assert_right(layer: LayerAttention, matrix: Tensor) -> None:
    """A CLS row: CLS first, and the patches behind it."""
    torch.testing.assert_close(layer.rows.double(), matrix[:, :, 0], atol=2e-6, rtol=1e-4)
    assert (layer.grid, layer.num_prefix, layer.places) == ((4, 4), 1, "exact")


def softmaxed(_: Attention, q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1)


def with_one_key_head(_: Attention, q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mean(1, keepdim=True).mT * SCALE).softmax(-1)


def with_sink(module: Attention, q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    sink = module.sink[:, None, None].to(scores).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def with_sink_first(module: Attention, q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    sink = module.sink[:, None, None].to(scores).expand(*scores.shape[:-1], 1)
    return torch.cat([sink, scores], -1).softmax(-1)[..., 1:]


def in_inference_mode(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        y = softmaxed(module, q, k) @ v
    return y.clone()


def fused_in_inference_mode(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        y = F.scaled_dot_product_attention(q, k, v)
    return y.clone()


def into_a_buffer(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = torch.empty(v.shape, dtype=v.dtype).flatten(0, 1)
    torch.bmm(softmaxed(module, q, k).flatten(0, 1), v.flatten(0, 1), out=y)
    return y.view(v.shape)


def on_a_residual(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmaxed(module, q, k).flatten(0, 1)
    y = torch.baddbmm(100 * q.flatten(0, 1), weights, v.flatten(0, 1), beta=0.5, alpha=2.0)
    return y.view(v.shape)


def channels_apart(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmaxed(module, q, k)
    return torch.cat([weights @ v[..., :3], weights @ v[..., 3:]], -1)


def one_key_head(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bjd->bhij", q * SCALE, k.mean(1)).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v.mean(1))


def one_key_head_v_first(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bjd,bhid->bhij", k.mean(1), q * SCALE).softmax(-1)
    return torch.einsum("bjd,bhij->bhid", v.mean(1), weights)


def one_key_head_dropped(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights that meet V are a copy of the softmax."""
    weights = torch.einsum("bhid,bjd->bhij", q * SCALE, k.mean(1)).softmax(-1).clone()
    return torch.einsum("bhij,bjd->bhid", weights, v.mean(1))


def sink(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_sink(module, q, k) @ v


def sink_first(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_sink_first(module, q, k) @ v


def vmapped(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda q, k, v: softmaxed(module, q, k) @ v)(q, k, v)


@pytest.mark.parametrize(
    ("attend", "weights"),
    [
        (in_inference_mode, softmaxed),
        (fused_in_inference_mode, softmaxed),
        (into_a_buffer, softmaxed),
        (on_a_residual, softmaxed),
        (channels_apart, softmaxed),
        (vmapped, softmaxed),
        (one_key_head, with_one_key_head),
        (one_key_head_v_first, with_one_key_head),
        (one_key_head_dropped, with_one_key_head),
        (sink, with_sink),
        (sink_first, with_sink_first),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("images", [1, 3])
def test_attention_is_read_however_it_is_written(attend: Attend, weights: Any, images: int) -> None:
    model = vit(attend)
    if attend is one_key_head_v_first and TORCH < (2, 9):  # einsum multiplies keys by the queries of all heads
        with pytest.raises(QueryError, match=r"its scores do not follow .* Choose one by its index"):
            record_attention(model, IMAGES[:images])
        assert_right(record_attention(model, IMAGES[:images], query=0)[0], truth(model, weights)[:images])
        return
    (layer,) = record_attention(model, IMAGES[:images])
    assert_right(layer, truth(model, weights)[:images])
    assert not layer.mixed
    assert layer.kind == ("weights" if "sink" in attend.__name__ else "distribution")
    (patch,) = record_attention(model, IMAGES[:images], query=(1, 2))
    torch.testing.assert_close(
        patch.rows.double(), truth(model, weights)[:images, :, 7], atol=2e-6, rtol=1e-4, msg=attend.__name__
    )


def two_parts_of_the_keys(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmaxed(module, q, k)
    return weights[..., :7] @ v[..., :7, :] + weights[..., 7:] @ v[..., 7:, :]


def complex_weights(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1).to(torch.complex64)
    return torch.view_as_real(weights @ torch.complex(v, -v))[..., 0]


def nested(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [torch.nested.nested_tensor(list(x)) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*parts).to_padded_tensor(0.0)


def jagged(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [
        torch.nested.as_nested_tensor(list(x.transpose(1, 2)), layout=torch.jagged).transpose(1, 2) for x in (q, k, v)
    ]
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).to_padded_tensor(0.0).transpose(1, 2)


def in_a_thread(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(softmaxed(module, q, k) @ v))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("attend", "kind", "reason"),
    [
        (two_parts_of_the_keys, UnsupportedAttentionError, "meets V in several products, with a part of its keys"),
        (complex_weights, UnsupportedAttentionError, "its weights are complex numbers"),
        (nested, UnsupportedAttentionError, "its tensors are nested"),
        pytest.param(
            *(jagged, UnsupportedAttentionError, "its tensors are nested"),
            marks=since_torch(2, 5, "jagged tensors can be padded"),
        ),
        (in_a_thread, NoAttentionError, "no batched product in its own thread"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
@pytest.mark.parametrize("images", [1, 3])
def test_attention_that_cannot_be_read_is_refused_for_its_reason(
    attend: Attend, kind: type[AttentionError], reason: str, images: int
) -> None:
    with pytest.raises(kind, match=reason):
        record_attention(vit(attend), IMAGES[:images])


class Around(nn.Module):
    """A backbone that is run by something else."""

    def __init__(self, backbone: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone, self.run = backbone, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.backbone, x)


@torch.inference_mode()
def inferred(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def run_in_a_thread(model: nn.Module, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(model(x).detach()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("attend", [sink, lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v)])
def test_a_whole_forward_in_inference_mode(attend: Attend) -> None:
    model = vit(attend)
    rows = [record_attention(m, IMAGES, layers="all") for m in (model, Around(model, inferred))]
    for plain, inside in zip(*rows, strict=True):
        torch.testing.assert_close(plain.rows, inside.rows)
    assert not any(p.is_inference() for p in model.parameters())


def test_a_model_that_runs_in_a_thread_is_refused() -> None:
    with pytest.raises(UnsupportedAttentionError, match=r"runs backbone.* in a thread of its own"):
        record_attention(Around(vit(sink), run_in_a_thread), IMAGES)


SCRIPTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "scripted": torch.jit.script,
    "frozen": lambda model: torch.jit.freeze(torch.jit.script(model)),
    "traced": lambda model: torch.jit.trace(model, IMAGES),
}
jit_warnings = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


@jit_warnings
@pytest.mark.parametrize("make", SCRIPTS.values(), ids=SCRIPTS.keys())
@pytest.mark.parametrize("runs", [0, 3])  # the interpreter optimises after two
def test_torchscript_is_read(make: Callable[[nn.Module], nn.Module], runs: int) -> None:
    torch.manual_seed(0)
    model = tiny_vit().eval()
    script = make(model)
    with torch.no_grad():
        for _ in range(runs):
            script(IMAGES)
    expected = record_attention(model, IMAGES, layers="all", query=0)
    # By index: frozen models have no parameters, by one of which the CLS token is known.
    for plain, found in zip(expected, record_attention(script, IMAGES, layers="all", query=0), strict=True):
        torch.testing.assert_close(plain.rows, found.rows, atol=1e-6, rtol=1e-5)
    (last,) = record_attention(script, IMAGES, query=0)
    torch.testing.assert_close(last.rows, expected[-1].rows, atol=1e-6, rtol=1e-5)


@jit_warnings
def test_a_scripted_teacher_beside_a_live_student() -> None:
    torch.manual_seed(0)
    student = tiny_vit()
    models = {"student": student, "teacher": torch.jit.script(student.eval())}
    snapshot = AttentionMonitor(ProbeBatch(IMAGES)).snapshot(models, step=0)
    torch.testing.assert_close(snapshot.rows("teacher"), snapshot.rows("student"), atol=1e-6, rtol=1e-5)


@jit_warnings
def test_in_torchscript_our_failure_is_ours_and_the_models_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    script = torch.jit.script(tiny_vit(dynamic_img_size=False).eval())
    with pytest.raises(ForwardError, match=r"^RecursiveScriptModule failed on images .*40, 40") as refused:
        record_attention(script, torch.randn(1, 3, 40, 40))
    assert "\n" not in str(refused.value)

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(FusedCall, "read", broken)
    with pytest.raises(KeyError, match="a mistake of ours"):
        record_attention(script, IMAGES)


COLD = """
import torch
from torch.nn.attention.flex_attention import flex_attention, create_block_mask
from attn_monitor import record_attention
from tests.hostile.test_attention_forms import IMAGES, assert_right, softmaxed, truth, vit
kept = lambda b, h, i, j: (i // 4 == j // 4) | (i == 0) | (j == 0)
for mask in (None, create_block_mask(kept, None, None, 17, 17, device="cpu")):
    model = vit(lambda _, q, k, v: flex_attention(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask))
    assert_right(record_attention(model, IMAGES)[0], truth(model, softmaxed))
"""


@pytest.mark.slow
@since_torch(2, 9, "flex attention is observed")
def test_flex_attention_that_has_not_run_before() -> None:
    """In a process of its own, in which nothing has compiled it yet; the CLS token attends to everything."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COLD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_dynamically_quantised_layers_are_refused_for_what_they_do() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny_vit().eval(), {nn.Linear})
    with pytest.raises(UnsupportedAttentionError, match="quantised by the range of the whole image"):
        record_attention(model, IMAGES)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@since_torch(2, 9, "linear layers take sparse weights")
def test_sparse_and_complex_weights_beside_attention() -> None:
    model = vit(sink)
    expected = record_attention(model, IMAGES)[0]
    model.filters = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    for block in model.blocks:
        block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight.to_sparse(), requires_grad=False)
    torch.testing.assert_close(record_attention(model, IMAGES)[0].rows, expected.rows)
