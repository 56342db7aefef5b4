"""What cannot be shown truthfully is refused, with a typed error that names module, operation, reason and remedy."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attn_monitor import errors
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from tests.support import styles
from tests.support.styles import PlainViT
from tests.support.zoo import enliven, timm_model, timm_vit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:timm", "ignore::DeprecationWarning:timm")


def swin() -> nn.Module:
    settings = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 2)}
    return timm_model("swin_tiny_patch4_window7_224", **settings)


def davit() -> nn.Module:
    return timm_model("davit_tiny", depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 2))


def pvt() -> nn.Module:
    return timm_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), num_heads=(1, 1, 2, 2))


def xcit(width: int) -> nn.Module:
    return timm_model("xcit_nano_12_p8_224", img_size=32, embed_dim=width, depth=2, num_heads=4)


class LinearAttention(nn.Module):
    """Softmax over channels, and no matrix of tokens by tokens anywhere."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(styles.DIM, 3 * styles.DIM), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (styles.split_heads(t, self.heads) for t in self.qkv(x).chunk(3, -1))
        context = k.softmax(-2).transpose(-2, -1) @ v
        return (q.softmax(-1) @ context).transpose(1, 2).flatten(2)


class PooledKeys(styles.MemEffAttention):
    """Attends to every second token."""

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        q, k, v = (styles.split_heads(t) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2])
        return self.proj(out.transpose(1, 2).flatten(2))


class RandomMasking(PlainViT):
    """Drops half the patches at random, in eval mode too, as MAE's encoder does."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        keep = torch.rand(len(x), x.shape[1]).argsort(1)[:, : x.shape[1] // 2]
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return x


class DroppedPatches(PlainViT):
    """Keeps the first half of the patches."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)[:, :13]
        for block in self.blocks:
            x = block(x)
        return x


class ShuffledHierarchy(PlainViT):
    """Merges neighbours between its blocks: the second block's tokens are no patches of the embedding."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks[0](self.patch_embed(images))
        return self.blocks[1](x.unflatten(1, (-1, 2)).mean(2))


def two_plausible() -> nn.Module:
    """Two prefix tokens under names that do not say which of them is CLS."""
    model = PlainViT(styles.MemEffAttention(), prefix=2)
    model.patch_embed.extra = model.patch_embed.cls_token
    model.patch_embed.cls_token = None

    def forward(images: Tensor) -> Tensor:
        embed = model.patch_embed
        x = embed.proj(images).flatten(2).transpose(1, 2) + embed.pos_embed
        return torch.cat([embed.extra.expand(len(x), -1, -1), x], 1)

    model.patch_embed.forward = forward
    return model


def not_a_number() -> nn.Module:
    model = timm_vit("vit_tiny_patch16_224")
    nn.init.constant_(model.blocks[1].attn.qkv.weight, float("nan"))
    return model


def plain(attention: Callable[[], nn.Module], **changes: Any) -> nn.Module:
    return PlainViT(attention(), attention(), **changes)


square = functools.partial(PlainViT, prefix=0, grid=(4, 4))
unsupported = errors.UnsupportedAttentionError
W, S = (32, 48), (32, 32)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], dict[str, Any], type[Exception], list[str]]] = {
    "windows": (swin, (64, 64), {"layers": 0}, unsupported, ["layers.0.blocks.0.attn", "16 sequences of 16 tokens"]),
    "channels": (davit, (56, 56), {}, unsupported, ["stages.1.blocks.0.1.attn", "several parts of the image"]),
    "channels as many as patches": (
        lambda: xcit(64),
        S,
        {"layers": 1},
        unsupported,
        ["blocks.1.attn", "several parts of the image", "can be read: [2"],
    ),
    "channels as many as tokens": (
        lambda: xcit(68),
        S,
        {"layers": 0},
        unsupported,
        ["blocks.0.attn", "several parts of the image", "can be read: [2"],
    ),
    "pooled hierarchy": (
        lambda: plain(PooledKeys),
        (32, 48),
        {"query": "mean"},
        unsupported,
        ["blocks.1.attn", "13 keys", "have a key of their own"],
    ),
    "pooled keys": (lambda: plain(PooledKeys), W, {}, unsupported, ["blocks.1.attn", "25 queries and 13 keys"]),
    "merged tokens": (
        lambda: ShuffledHierarchy(styles.MemEffAttention(), PooledKeys(), prefix=0),
        W,
        {"query": "mean"},
        unsupported,
        ["blocks.1.attn", "12 queries"],
    ),
    "no attention": (lambda: timm_model("resnet18"), S, {}, errors.NoAttentionError, ["ResNet", "no batched product"]),
    "linear attention": (
        lambda: plain(LinearAttention),
        W,
        {},
        unsupported,
        ["blocks.1.attn", "25 queries and 16 keys"],
    ),
    "linear attention, square": (
        lambda: square(LinearAttention(), LinearAttention()),
        S,
        {"query": "mean"},
        unsupported,
        ["blocks.1.attn", "softmax -> bmm", "several parts of the image"],
    ),
    "which is CLS": (
        two_plausible,
        W,
        {},
        errors.QueryError,
        ["blocks.0.attn", "2 of its queries could be the CLS token, [0, 1]", "query=<index>"],
    ),
    "no CLS": (
        lambda: plain(styles.MemEffAttention, prefix=0),
        W,
        {},
        errors.QueryError,
        ["all of them patches", 'query="mean"'],
    ),
    "no multiple of the patch": (
        lambda: timm_vit("vit_tiny_patch16_224", dynamic_img_size=True),
        (33, 48),
        {},
        errors.ForwardError,
        ["VisionTransformer", "(3, 3, 33, 48)", "multiple of its patch size", "forward=lambda"],
    ),
    "NaN": (not_a_number, W, {}, errors.NonFiniteAttentionError, ["blocks.1.attn", "NaN"]),
    "random masking": (
        lambda: RandomMasking(styles.MemEffAttention()),
        W,
        {},
        errors.ForwardError,
        ["identical images", "random even in eval mode", "forward=lambda"],
    ),
    "dropped patches": (
        lambda: DroppedPatches(styles.MemEffAttention()),
        W,
        {},
        unsupported,
        ["blocks.0.attn", "13 keys", "12 have a key of their own"],
    ),
    "several images packed": (
        styles.Dinov2ViT,
        W,
        {"forward": lambda m, x: m.forward_features([x, x], [None, None])},
        unsupported,
        ["blocks.1.1.attn", "2 sequences of 25 tokens for each image"],
    ),
    "no such layer": (
        lambda: plain(styles.MemEffAttention),
        W,
        {"layers": 2},
        errors.LayerError,
        ["layers=2", "-2 to 1"],
    ),
    "no such module": (
        lambda: plain(styles.MemEffAttention),
        W,
        {"layers": "norm"},
        errors.LayerError,
        ["'norm'", "blocks.0.attn"],
    ),
    "no such patch": (
        lambda: plain(styles.MemEffAttention),
        W,
        {"query": (4, 0)},
        errors.QueryError,
        ["4 rows and 6 columns"],
    ),
    "no such token": (lambda: plain(styles.MemEffAttention), W, {"query": 25}, errors.QueryError, ["tokens 0 to 24"]),
}


@pytest.mark.parametrize("name", CASES)
def test_refusal_names_its_reason(name: str) -> None:
    build, size, arguments, kind, words = CASES[name]
    model = build().eval() if name == "NaN" else enliven(build()).eval()
    images = torch.randn(3, 3, *size)
    with pytest.raises(kind) as caught:
        record_attention(model, images, **arguments)
    for word in words:
        assert word in str(caught.value)
    if kind is unsupported:
        assert re.search(r"\(.*(softmax -> bmm|aten\._scaled_dot_product\w+).*\)", str(caught.value)), "operation"
        assert re.search("Choose another layer. Layers that can be read|No other layer", str(caught.value)), "remedy"


def test_windows_folded_into_heads_are_refused() -> None:
    class FoldedWindows(styles.MemEffAttention):
        def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
            windows = x.unflatten(1, (4, -1))  # (B, 4, N/4, C)
            q, k, v = (t.unflatten(-1, (styles.HEADS, -1)).transpose(2, 3) for t in self.qkv(windows).chunk(3, -1))
            out = ((q @ k.mT).softmax(-1) @ v).transpose(2, 3)
            return self.proj(out.flatten(3).flatten(1, 2))

    model = enliven(PlainViT(FoldedWindows(), prefix=0)).eval()
    with pytest.raises(unsupported, match="6 queries and 6 keys"):
        record_attention(model, torch.randn(2, 3, *W), query="mean")


def test_sharded_tensors_are_refused() -> None:
    class Ragged(styles.MemEffAttention):
        def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
            q, k, v = (Sharded(styles.split_heads(t)) for t in self.qkv(x).chunk(3, -1))
            return self.proj(F.scaled_dot_product_attention(q, k, v).whole.transpose(1, 2).flatten(2))

    class Sharded(Tensor):
        """Stands for DTensor: a subclass with operations of its own, and without a storage."""

        whole: Tensor
        __torch_function__ = torch._C._disabled_torch_function_impl

        def __new__(cls, whole: Tensor) -> Any:
            made = Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)
            made.whole = whole
            return made

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*tree_map_only(Sharded, lambda x: x.whole, args), **(kwargs or {}))
            return tree_map_only(Tensor, Sharded, out)

    model = enliven(PlainViT(Ragged())).eval()
    with pytest.raises(unsupported, match="operations of their own"):
        record_attention(model, torch.randn(2, 3, *W))


def test_rows_that_do_not_give_the_output_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heart of the matter: were our reading of the operation wrong by 5 %, no map would be shown."""
    from attn_monitor.capture.observe.kinds.fused import FusedCall

    model, images = enliven(timm_vit("vit_tiny_patch16_224")).eval(), torch.randn(2, 3, *W)
    record_attention(model, images)
    original = FusedCall._scores
    monkeypatch.setattr(FusedCall, "_scores", lambda self, queries: original(self, queries) * 1.05)
    for query in ("cls", "mean"):
        with pytest.raises(errors.VerificationError) as caught:
            record_attention(model, images, query=query)
        for word in ("layer 1 (blocks.1.attn, aten._scaled_dot_product_", "differs", "no map is shown", "report"):
            assert word in str(caught.value)


def test_a_change_after_the_first_look_is_shown() -> None:
    """The first look finds plain attention; later the same site mixes its heads, and says so without being verified."""

    class Switch(styles.DinoAttention):
        mixing = False

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, styles.HEADS, -1).permute(2, 0, 3, 1, 4)
            attn = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
            attn = attn - 0.5 * attn.flip(1) if self.mixing else attn
            return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c)), attn

    model = styles.DinoViT()
    model.attn[1] = Switch()
    model, images = enliven(model).eval(), torch.randn(2, 3, *W)
    recorder = AttentionRecorder(model, verify=False)
    (before,) = recorder(images)
    model.attn[1].mixing = True  # type: ignore[assignment]
    (after,) = recorder(images)
    assert not before.mixed
    assert after.mixed
    assert torch.allclose(after.rows, before.rows - 0.5 * before.rows.flip(1)), "what meets V is shown"
    assert (before.kind, after.kind) == ("distribution", "signed")


def test_layers_that_all_leaves_out_are_one_warning() -> None:
    class Random(styles.MemEffAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5))

    model, images = enliven(PlainViT(styles.MemEffAttention(), Random(), Random())).eval(), torch.randn(2, 3, *W)
    with pytest.warns(UserWarning, match='layers="all" leaves out 2 of the layers of PlainViT') as caught:
        (attention,) = record_attention(model, images, layers="all")
    assert attention.layer == 0
    (told,) = caught
    assert told.filename == __file__
    for layer in (1, 2):
        assert f"layer {layer} (blocks.{layer}" in str(told.message)
    assert str(told.message).count("random even in eval mode") == 2
    assert len(AttentionRecorder(model, layers="all")(images)) == 1  # which tells by `left_out`, without a warning
    record_attention(model, images, layers=0)


def test_every_error_has_one_base() -> None:
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__]
    assert all(issubclass(k, errors.AttnMonitorError) for k in kinds)
    assert sum(issubclass(k, errors.AttentionError) for k in kinds) >= 8
