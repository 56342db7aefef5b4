"""The attention kernels that GPUs run, on the CPU: under their own names and schemas, with a float64 inside.

Each of `WAYS` takes and gives (B, N, H, D) tensors. `matrices_of` runs a model and returns what each kernel computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.styles import HEADS

Way = Callable[[Tensor, Tensor, Tensor], Tensor]

MATRICES: list[Tensor] = []  # (B, H, N, N) of each call


def rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    keep: bool = True,
) -> Tensor:
    """Attention on (B, N, H, D), by the definition in flash-attn's README, in float64 and NumPy."""
    q_, k_, v_ = (t.detach().double().numpy().transpose(0, 2, 1, 3) for t in (q, k, v))
    groups = q_.shape[1] // k_.shape[1]
    k_, v_ = k_.repeat(groups, 1), v_.repeat(groups, 1)
    scores = np.einsum("bhid,bhjd->bhij", q_, k_) * (q_.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double().numpy()
    i, j = np.arange(scores.shape[-2])[:, None], np.arange(scores.shape[-1])
    if alibi is not None:
        scores = scores - alibi.double().numpy()[:, None, None] * abs(i - j)
    if causal:
        scores = np.where(j > i, -np.inf, scores)
    if window[0] >= 0:
        scores = np.where(j < i - window[0], -np.inf, scores)
    if window[1] >= 0:
        scores = np.where(j > i + window[1], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.double().numpy()[:, None, None] - scores.max(-1, keepdims=True))
    weights = weights / total
    if keep:
        MATRICES.append(torch.from_numpy(weights))
    out = np.ascontiguousarray((weights @ v_).transpose(0, 2, 1, 3))
    return torch.from_numpy(out).to(q.dtype)


def _of_lengths(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, **options: Any) -> Tensor:
    """Packed sequences (T, H, D), one after the other; kept as one matrix (B, H, N, N) if they are of one length."""
    ends, first = cu.tolist(), len(MATRICES)
    parts = [rule(*(t[None, a:b] for t in (q, k, v)), **options)[0] for a, b in itertools.pairwise(ends)]
    found = MATRICES[first:]
    if len({m.shape for m in found}) == 1:
        MATRICES[first:] = [torch.cat(found)]
    return torch.cat(parts)


def _lengths(q: Tensor) -> Tensor:
    return torch.arange(0, len(q) + 1, dtype=torch.int32) * q.shape[1]


_aten = torch.library.Library("aten", "IMPL")


def _efficient(
    q, k, v, bias, cu_q, cu_k, max_q, max_k, p, mask_type, lse=False, *, scale=None, seqlen_k=None, window_size=None
):  # type: ignore[no-untyped-def]
    options = {"scale": scale, "causal": mask_type > 0, "bias": bias}
    out = rule(q, k, v, **options) if cu_q is None else _of_lengths(q[0], k[0], v[0], cu_q, **options)[None]
    return out, q.new_empty(0), q.new_empty(0), q.new_empty(0), q.shape[1], k.shape[1]


def _flash(
    q,
    k,
    v,
    cu_q,
    cu_k,
    max_q,
    max_k,
    p,
    causal,
    debug,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
    block_table=None,
    num_splits=None,
):  # type: ignore[no-untyped-def]
    window = tuple(-1 if side is None else side for side in (window_size_left, window_size_right))
    options = {"scale": scale, "causal": causal, "window": window, "alibi": alibi_slopes}
    out = rule(q, k, v, **options) if cu_q is None else _of_lengths(q, k, v, cu_q, **options)
    return (out, *(q.new_empty(0) for _ in range(4)))


def _cudnn(
    q,
    k,
    v,
    bias,
    cu_q,
    cu_k,
    max_q,
    max_k,
    lse,
    p=0.0,
    causal=False,
    debug=False,
    *,
    scale=None,
    seqused_k=None,
    block_table=None,
):  # type: ignore[no-untyped-def]
    out = rule(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale, causal=causal, bias=bias).transpose(1, 2)
    empty = [q.new_empty(0) for _ in range(6)]
    return out.contiguous(), *empty[:3], max_q, max_k, *empty[3:]


def _of_torch(
    q, k, v, cu_q, cu_k, max_q, max_k, causal=False, scale=None, window_size=None, enable_gqa=False, *_, **__
):  # type: ignore[no-untyped-def]
    window = tuple(window_size or (-1, -1))
    return _of_lengths(q, k, v, cu_q, scale=scale, causal=causal, window=window), q.new_empty(0), q.new_empty(0)


_aten.impl("_efficient_attention_forward", _efficient, "CPU")
_aten.impl("_flash_attention_forward", _flash, "CPU")
_aten.impl("_cudnn_attention_forward", _cudnn, "CPU")
try:
    from torch.nn.attention.varlen import varlen_attn
except ModuleNotFoundError:

    def varlen_attn(*_: Any) -> Tensor:
        pytest.skip("torch.nn.attention.varlen came with PyTorch 2.10")
else:
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", _of_torch)

_libraries = [torch.library.Library(name, "DEF") for name in ("flash_attn", "flash_attn_3", "xformers_flash")]


def _define(library: torch.library.Library, schema: str, function: Callable[..., Any]) -> None:
    library.define(schema)
    library.impl(schema.partition("(")[0], function, "CPU")


def _fa2(q, k, v, p, scale, causal, left, right, softcap, alibi, softmax):  # type: ignore[no-untyped-def]
    out = rule(q, k, v, scale=scale, causal=causal, window=(left, right), softcap=softcap, alibi=alibi)
    return out, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), q.new_empty(0), q.new_empty(0)


def _fa2_varlen(
    q, k, v, cu_q, cu_k, max_q, max_k, p, scale, causal, left=-1, right=-1, softcap=0.0, alibi=None, *_, **__
):  # type: ignore[no-untyped-def]
    options = {"scale": scale, "causal": causal, "window": (left, right), "softcap": softcap, "alibi": alibi}
    return _of_lengths(q, k, v, cu_q, **options), q.new_empty(0), q.new_empty(0), q.new_empty(0)


def _fa3(
    q,
    k,
    v,
    cu_seqlens_q=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    s_aux=None,
    **_,
):  # type: ignore[no-untyped-def]
    options = {
        "scale": softmax_scale,
        "causal": is_causal,
        "window": (window_size_left, window_size_right),
        "softcap": softcap,
        "sinks": s_aux,
    }
    out = rule(q, k, v, **options) if cu_seqlens_q is None else _of_lengths(q, k, v, cu_seqlens_q, **options)
    return out, q.new_empty(0), q.new_empty(0), q.new_empty(0)


def _fa3_positional(
    q,
    k,
    v,
    k_new,
    v_new,
    qv,
    out,
    cu_q,
    cu_k,
    cu_new,
    used_q,
    used_k,
    max_q,
    max_k,
    scale,
    causal,
    left,
    right,
    softcap,
    s_aux,
):  # type: ignore[no-untyped-def]
    return _fa3(q, k, v, cu_q, scale, causal, left, right, softcap, s_aux)


def _xformers(q, k, v, cu_q, cu_k, used, max_q, max_k, p, scale, causal, left, right, softmax, block_tables):  # type: ignore[no-untyped-def]
    options = {"scale": scale, "causal": causal, "window": (left, right)}
    out = rule(q, k, v, **options) if cu_q is None else _of_lengths(q, k, v, cu_q, **options)
    return out, q.new_empty(0), q.new_empty(0)


_define(
    _libraries[0],
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, SymInt "
    "window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) -> (Tensor, "
    "Tensor, Tensor, Tensor)",
    _fa2,
)
_define(
    _libraries[0],
    "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt "
    "max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0., Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? "
    "block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False) -> (Tensor, Tensor, "
    "Tensor, Tensor)",
    _fa2_varlen,
)
_define(
    _libraries[1],
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? "
    "max_seqlen_k, float? softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap, "
    "Tensor? s_aux) -> (Tensor, Tensor, Tensor, Tensor)",
    _fa3_positional,
)
_define(
    _libraries[2],
    "flash_fwd(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "int max_seqlen_q, int max_seqlen_k, float p, float softmax_scale, bool is_causal, int window_left, int "
    "window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)",
    _xformers,
)


def fa2(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """flash_attn_func of flash-attn 2.7 and newer."""
    given = {"scale": q.shape[-1] ** -0.5, "causal": False, "left": -1, "right": -1, "softcap": 0.0, "alibi": None}
    given |= options
    out: Tensor = torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, *given.values(), False)[0]
    return out


def fa3(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None = None, s_aux: Tensor | None = None) -> Tensor:
    """flash_attn_func of flash-attn 3."""
    lengths = (cu, cu, None, None, None, None if cu is None else 25, None if cu is None else 25)
    given = (None, None, None, None, *lengths, None, False, -1, -1, 0.0, s_aux)
    out: Tensor = torch.ops.flash_attn_3.fwd(q, k, v, *given)[0]
    return out


def efficient(q: Tensor, k: Tensor, v: Tensor, *lengths: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """xFormers' cutlass operator in float32."""
    cu = lengths or (None, None)
    given = (bias, *cu, q.shape[1] if lengths else None, k.shape[1] if lengths else None, 0.0, 0)
    out: Tensor = torch.ops.aten._efficient_attention_forward(q, k, v, *given, **options)[0]
    return out


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xFormers in half precision: channels are padded to a multiple of 8, the scale is that of before."""
    width = q.shape[-1]
    wide = [F.pad(t, (0, -width % 8 + 8)) for t in (q, k, v)]
    lengths = (None, None, None, q.shape[1], k.shape[1])
    given = (*lengths, 0.0, width**-0.5, False, -1, -1, False, None)
    out: Tensor = torch.ops.xformers_flash.flash_fwd(*wide, *given)[0]
    return out[..., :width]


def packed(call: Callable[..., Tensor]) -> Way:
    """Call a kernel for sequences that are packed into one, (T, H, D), with cumulative lengths."""

    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = call(*(t.flatten(0, 1).contiguous() for t in (q, k, v)), _lengths(q))
        return out.unflatten(0, q.shape[:2])

    return way


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own, whose backends are all known."""
    rule(q, k, v)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def block_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Qwen2-VL's tower: all images in one sequence, and a mask that keeps them apart."""
    rule(q, k, v)
    apart = torch.block_diag(*torch.ones(len(q), q.shape[1], k.shape[1])).bool()[None, None]
    one = [t.flatten(0, 1).transpose(0, 1)[None] for t in (q, k, v)]  # (1, H, T, D)
    return F.scaled_dot_product_attention(*one, attn_mask=apart)[0].transpose(0, 1).unflatten(0, q.shape[:2])


def unseen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """A C++ extension: it fills memory that Python has allocated, and no dispatched operation shows it."""
    out = torch.empty(q.shape, dtype=q.dtype)
    np.copyto(out.numpy(), rule(q, k, v, **options).numpy())
    return out


class FlashAttention(torch.autograd.Function):
    """flash-attn before 2.7, flash-attn 4, Triton's tutorial."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return unseen(q, k, v, scale=softmax_scale, causal=causal)


class FlashAttentionPacked(torch.autograd.Function):
    """FlashAttnQKVPackedFunc."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, softmax_scale: float | None) -> tuple[Tensor, Tensor]:
        out = unseen(*qkv.unbind(2), scale=softmax_scale)
        return out, out.new_zeros(3)


class FlashAttentionVarlen(torch.autograd.Function):
    """FlashAttnVarlenFunc."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
        out = torch.empty(q.shape)
        np.copyto(out.numpy(), _of_lengths(q, k, v, cu_seqlens_q).numpy())
        return out


class NewStyle(torch.autograd.Function):
    """With a context of its own, on (B, H, N, D)."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
        out = unseen(*(t.transpose(1, 2) for t in (q, k, v)), scale=sm_scale)
        return out.transpose(1, 2).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""


class Rotary(torch.autograd.Function):
    """No attention, though it takes three tensors of one shape."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty(q.shape)
        x, c, s = q.numpy(), cos.numpy(), sin.numpy()
        half = x.shape[-1] // 2
        np.copyto(out.numpy(), x * c + np.concatenate([-x[..., half:], x[..., :half]], -1) * s)
        return out


attention = FlashAttention.apply  # as libraries do when they are imported


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotary embedding in a kernel of its own before SDPA."""
    angle = torch.arange(q.shape[1]).float()[None, :, None, None].expand(q.shape) * 0.1
    return sdpa(*(Rotary.apply(t, angle.cos().contiguous(), angle.sin().contiguous()) for t in (q, k)), v)


def grouped(call: Way) -> Way:
    """Two heads of keys and values for four of queries."""
    return lambda q, k, v: call(q, k[:, :, : HEADS // 2].contiguous(), v[:, :, : HEADS // 2].contiguous())


def _bias(q: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(1, q.shape[2], q.shape[1], q.shape[1], generator=generator)
    return bias.expand(len(q), -1, -1, -1)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not hasattr(torch.ops.aten, "_cudnn_attention_forward"):
        pytest.skip("aten._cudnn_attention_forward came after PyTorch 2.4, with 2.8 at the latest")
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.ops.aten._cudnn_attention_forward(*heads_first, None, None, None, q.shape[1], k.shape[1], False)
    return out[0].transpose(1, 2)


_SLOPES = torch.tensor([0.3, 0.1, 0.05, 0.01])
_SINKS = torch.tensor([1.0, 2.0, 0.0, 3.0])

WAYS: dict[str, Way] = {
    "aten efficient": efficient,
    "aten efficient, scale": lambda q, k, v: efficient(q, k, v, scale=0.6),
    "aten efficient, bias": lambda q, k, v: efficient(q, k, v, bias=_bias(q)),
    "aten efficient, packed": packed(lambda q, k, v, cu: efficient(q[None], k[None], v[None], cu, cu)[0]),
    "aten flash": lambda q, k, v: torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False
    )[0],
    "aten flash, packed": packed(
        lambda q, k, v, cu: torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, 25, 25, 0.0, False, False)[0]
    ),
    "aten cudnn": cudnn,
    "torch varlen": packed(lambda q, k, v, cu: varlen_attn(q, k, v, cu, cu, 25, 25)),
    "flash-attn 2": fa2,
    "flash-attn 2, causal": lambda q, k, v: fa2(q, k, v, causal=True),
    "flash-attn 2, window": lambda q, k, v: fa2(q, k, v, left=9, right=20),
    "flash-attn 2, softcap": lambda q, k, v: fa2(q, k, v, softcap=2.0),
    "flash-attn 2, alibi": lambda q, k, v: fa2(q, k, v, alibi=_SLOPES),
    "flash-attn 2, grouped": grouped(fa2),
    "flash-attn 2, packed": packed(
        lambda q, k, v, cu: torch.ops.flash_attn._flash_attn_varlen_forward(q, k, v, cu, cu, 25, 25, 0.0, 0.4, False)[0]
    ),
    "flash-attn 3": fa3,
    "flash-attn 3, packed": packed(fa3),
    "flash-attn 3, sinks": lambda q, k, v: fa3(q, k, v, s_aux=_SINKS),
    "xformers half": padded,
    "function": lambda q, k, v: attention(q, k, v, None, False),
    "function, scale and causal": lambda q, k, v: FlashAttention.apply(q, k, v, 0.7, True),
    "function, qkv": lambda q, k, v: FlashAttentionPacked.apply(torch.stack([q, k, v], 2), None)[0],
    "function, packed": packed(lambda q, k, v, cu: FlashAttentionVarlen.apply(q, k, v, cu, cu)),
    "function, heads first": lambda q, k, v: NewStyle.apply(
        *(t.transpose(1, 2).contiguous() for t in (q, k, v)), 0.5
    ).transpose(1, 2),
    "block-diagonal mask": block_diagonal,
    "rotary kernel": rotated,
    "sdpa": sdpa,
}


def matrices_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Run the model; the (B, H, N, N) matrix of each of its attentions in float64."""
    MATRICES.clear()
    with torch.no_grad():
        model(images)
    found = [*MATRICES]
    MATRICES.clear()
    assert all(math.isfinite(float(m.sum())) for m in found)
    return found
