"""The same maps under the conditions of training: sizes, precisions, memory formats, compilation, adapters."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.errors import AttentionError, ForwardError, UnsupportedAttentionError, VerificationError
from tests.support import styles
from tests.support.oracle import attention_matrices
from tests.support.releases import TORCH, since_torch
from tests.support.styles import PlainViT
from tests.support.tiers import sweep
from tests.support.zoo import enliven, timm_vit


def vit(**changes: Any) -> nn.Module:
    return enliven(timm_vit("vit_tiny_patch16_224", dynamic_img_size=True, **changes)).eval()


def cls_rows(model: nn.Module, images: Tensor) -> Tensor:
    """The last layer's CLS row in float64."""
    return attention_matrices(model, images, default_forward)[-1][:, :, 0]


def off_by(rows: Tensor, expected: Tensor) -> float:
    """Largest difference in units of uniform attention."""
    assert rows.shape == expected.shape
    return float((rows.double() - expected).abs().amax()) * rows.shape[-1]


@pytest.mark.parametrize(
    "shape", [(2, 3, 32, 48), (1, 3, 32, 48), (5, 3, 48, 32), (1, 3, 96, 64), (2, 3, 8, 8), (3, 3, 8, 40)]
)
def test_sizes_and_batches(shape: tuple[int, ...]) -> None:
    model, images = vit(), torch.randn(shape)
    for query in ("cls", "mean"):
        (attention,) = record_attention(model, images, query=query)
        matrix = attention_matrices(model, images, default_forward)[-1]
        assert attention.grid == (shape[2] // 8, shape[3] // 8)
        assert off_by(attention.rows, matrix[:, :, 0] if query == "cls" else matrix.mean(2)) <= 1e-3


def test_one_recorder_follows_the_image_size() -> None:
    model = vit()
    recorder = AttentionRecorder(model, query="mean")
    for height, width in ((32, 48), (40, 40), (32, 48)):
        images = torch.randn(3, 3, height, width)
        (attention,) = recorder(images)
        assert attention.grid == (height // 8, width // 8)
        assert off_by(attention.rows, attention_matrices(model, images, default_forward)[-1].mean(2)) <= 1e-3


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, fused: bool) -> None:
    model, images = vit(fused=fused), torch.randn(2, 3, 32, 48)
    rows = []

    def forward(m: nn.Module, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return m(x)

    (attention,) = record_attention(model, images, forward=forward)
    expected = cls_rows(model, images)
    rows.append(attention.rows)
    assert attention.rows.dtype == torch.float32
    assert not attention.mixed
    # Half precision changes what the model computes; the row is still that of the half-precision model.
    assert 1e-4 < off_by(attention.rows, expected) < (0.6 if dtype == torch.bfloat16 else 0.1)
    if fused:
        assert attention.verified_error < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precision(dtype: torch.dtype) -> None:
    model, images = vit().to(dtype), torch.randn(2, 3, 32, 48)
    (attention,) = record_attention(model, images)
    assert off_by(attention.rows, cls_rows(model, images.to(dtype))) < (1e-5 if dtype == torch.float64 else 0.6)
    assert attention.rows.dtype == torch.float32


def test_channels_last() -> None:
    model, images = vit(), torch.randn(2, 3, 32, 48)
    expected = cls_rows(model, images)
    model.to(memory_format=torch.channels_last)
    (attention,) = record_attention(model, images.to(memory_format=torch.channels_last))
    assert off_by(attention.rows, expected) <= 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    class Checkpointed(PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            x = self.patch_embed(images)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    model, images = enliven(Checkpointed(styles.MemEffAttention(), styles.MemEffAttention())), torch.randn(2, 3, 32, 48)
    with pytest.warns() if reentrant else contextlib.nullcontext():  # PyTorch: no input requires a gradient
        expected = cls_rows(model, images)
        (attention,) = record_attention(model, images)
    assert off_by(attention.rows, expected) <= 1e-3


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_sdpa_backends(backend: SDPBackend) -> None:
    model, images = vit(), torch.randn(2, 3, 32, 48)
    with sdpa_kernel(backend):
        recorder = AttentionRecorder(model)
        (attention,) = recorder(images)
    assert ("softmax" in recorder.sites(images)[0].op) == (backend == SDPBackend.MATH)
    assert off_by(attention.rows, cls_rows(model, images)) <= 1e-3


class Variant(styles.MemEffAttention):
    """Attention by one of the many ways to call PyTorch."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        q, k, v = (styles.split_heads(t) for t in self.qkv(x).chunk(3, -1))
        b, h, n, d = q.shape
        if self.way == "three dimensions":  # (B·H, N, D)
            out = F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in (q, k, v))).unflatten(0, (b, h))
        elif self.way == "heads outermost":  # (H·B, N, D), as the first PyTorch transformers had it
            q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (q, k, v))
            out = ((q @ k.mT / d**0.5).softmax(-1) @ v).unflatten(0, (h, b)).transpose(0, 1)
        elif self.way == "heads outermost, fused":  # (H, B, N, D)
            out = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v))).transpose(0, 1)
        elif self.way == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).div(d**0.5).softmax(dim=-1)
            out = torch.einsum("bhij,bhjd->bhid", weights, v)
        elif self.way == "einsum, V first":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).div(d**0.5).softmax(dim=-1)
            out = torch.einsum("bhjd,bhij->bhid", v, weights)
        elif self.way == "float mask":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.linspace(-3, 0, n).expand(b, 1, n, n))
        elif self.way == "boolean mask":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=(torch.arange(n) != n - 2)[None])
        elif self.way == "causal":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.way == "grouped queries":
            k, v = k[:, ::2], v[:, ::2]
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif self.way == "scale":
            out = F.scaled_dot_product_attention(q, k, v, scale=0.11)
        else:
            out = F.scaled_dot_product_attention(q, k.contiguous(), v)
        return self.proj(out.transpose(1, 2).flatten(2))


WAYS = [
    "three dimensions", "heads outermost", "heads outermost, fused", "einsum", "einsum, V first", "float mask",
    "boolean mask", "causal", "scale", "contiguous keys",
]  # fmt: skip


@pytest.mark.parametrize("heads", sweep([4, 3], quick=1), ids=["4 heads", "as many heads as images"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_call_attention(way: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(styles, "HEADS", heads)
    monkeypatch.setattr(styles, "DIM", 24)
    model = enliven(PlainViT(Variant(way), Variant(way))).eval()
    images = torch.randn(3, 3, 32, 48)
    for query in ("cls", "mean", (3, 5)):
        (attention,) = record_attention(model, images, query=query)  # type: ignore[arg-type]
        matrix = attention_matrices(model, images, default_forward)[-1]
        if way == "three dimensions":
            matrix = matrix.reshape(3, heads, *matrix.shape[2:])
        elif "outermost" in way:
            matrix = matrix.reshape(heads, 3, *matrix.shape[2:]).transpose(0, 1)
        expected = {"cls": matrix[:, :, 0], "mean": matrix.mean(2)}.get(query, matrix[:, :, 24])  # type: ignore[call-overload]
        assert off_by(attention.rows, expected) <= 1e-3
        assert attention.grid == (4, 6)


@since_torch(2, 5, "SDPA takes enable_gqa")
def test_grouped_queries() -> None:
    model, images = enliven(PlainViT(Variant("grouped queries"))).eval(), torch.randn(2, 3, 32, 48)
    (attention,) = record_attention(model, images)
    attn = model.blocks[0].attn
    with torch.no_grad():
        x = model.blocks[0].norm1(model.patch_embed(images))
        q, k, _ = (styles.split_heads(t) for t in attn.qkv(x).chunk(3, -1))
    expected = (q @ k[:, ::2].repeat_interleave(2, 1).mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0]
    assert off_by(attention.rows, expected.double()) <= 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by Dynamo itself
@pytest.mark.parametrize("form", ["wrapper", "in place", "per block"])
def test_compiled_model_is_read_and_not_traced_again(form: str) -> None:
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model, images = PlainViT(styles.MemEffAttention(), styles.MemEffAttention()), torch.randn(2, 3, 32, 48)
    enliven(model)
    expected = cls_rows(model, images)
    trained: Any = model
    if form == "wrapper":
        trained = torch.compile(model, backend=counter)
    elif form == "in place":
        model.compile(backend=counter)
    else:
        for block in model.blocks:
            block.compile(backend=counter)
    trained(images).sum().backward()
    frames = counter.frame_count
    assert frames > 0
    recorder = AttentionRecorder(trained, layers="all")
    for _ in range(2):
        attention = recorder(images)[-1]
        assert off_by(attention.rows, expected) <= 1e-3
        trained(images).sum().backward()
    assert counter.frame_count == frames, "the probe made the compiler trace again"
    torch._dynamo.reset()


def test_frozen_and_lora_adapted_models() -> None:
    from peft import LoraConfig, get_peft_model

    images = torch.randn(2, 3, 32, 48)
    base = vit().requires_grad_(False)
    assert off_by(record_attention(base, images)[0].rows, cls_rows(base, images)) <= 1e-3
    adapted = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=["qkv"], init_lora_weights=False, lora_alpha=64)
    )
    (attention,) = record_attention(adapted, images)
    assert attention.name == "base_model.model.blocks.1.attn"
    assert off_by(attention.rows, cls_rows(adapted, images)) <= 1e-3
    assert off_by(attention.rows, cls_rows(base, images)) > 0.1


def test_module_without_weights_yet_is_refused_and_read_later() -> None:
    with torch.device("meta"):
        model = timm_vit("vit_tiny_patch16_224")
    images = torch.randn(2, 3, 32, 48)
    recorder = AttentionRecorder(model)
    with pytest.raises(ForwardError, match=r"meta.*configure_model"):
        recorder(images)
    model.to_empty(device="cpu")
    enliven(model).eval()
    model.init_weights()
    (attention,) = recorder(images)
    assert off_by(attention.rows, cls_rows(model, images)) <= 1e-3


def test_user_given_forward_and_its_mistakes() -> None:
    class TwoArguments(PlainViT):
        def forward(self, images: Tensor, scale: float) -> Tensor:  # type: ignore[override]
            return super().forward(images * scale)

    model, images = enliven(TwoArguments(styles.MemEffAttention())).eval(), torch.randn(2, 3, 32, 48)
    with pytest.raises(ForwardError, match=r"scale.*or forward=lambda model, images"):
        record_attention(model, images)
    (attention,) = record_attention(model, images, forward=lambda m, x: m(x, 0.5))
    assert off_by(attention.rows, attention_matrices(model, images, lambda m, x: m(x, 0.5))[-1][:, :, 0]) <= 1e-3


class _Flex(styles.MemEffAttention):
    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (styles.split_heads(t) for t in self.qkv(x).chunk(3, -1))
        return self.proj(flex_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@since_torch(2, 9, "flex attention is observed")
def test_flex_attention() -> None:
    model, images = enliven(PlainViT(_Flex(), _Flex())).eval(), torch.randn(2, 3, 32, 48)
    plain = PlainViT(styles.MemEffAttention(), styles.MemEffAttention()).eval()
    plain.load_state_dict(model.state_dict())
    (attention,) = record_attention(model, images)
    assert off_by(attention.rows, cls_rows(plain, images)) <= 1e-3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@since_torch(2, 9, "flex attention is observed")
def test_flex_attention_whose_scores_are_modified_is_refused() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Biased(styles.MemEffAttention):
        def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
            q, k, v = (styles.split_heads(t) for t in self.qkv(x).chunk(3, -1))
            out = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - 0.1 * (i - j).abs())
            return self.proj(out.transpose(1, 2).flatten(2))

    with pytest.raises(VerificationError, match=r"blocks.0.attn, flex_attention"):
        record_attention(enliven(PlainViT(Biased())).eval(), torch.randn(2, 3, 32, 48))


@pytest.mark.skipif(not (2, 5) <= TORCH < (2, 9), reason="flex attention came with PyTorch 2.5, is read from 2.9 on")
def test_flex_attention_is_refused_where_it_cannot_be_observed() -> None:
    from torch.nn.attention import flex_attention

    model = PlainViT(_Flex()).eval()
    with pytest.raises(UnsupportedAttentionError, match=r"calls flex_attention, which .* from PyTorch 2.9 on"):
        record_attention(model, torch.randn(2, 3, 32, 48))
    assert flex_attention.torch is torch


def test_images_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match=r"images: received \(3, 32, 48\).*expected"):
        record_attention(vit(), torch.randn(3, 32, 48))
    with pytest.raises(AttentionError):
        record_attention(vit(), torch.randn(2, 4, 32, 48))
