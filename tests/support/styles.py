"""Vision transformers in the ways that published code writes them, anew and small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, PATCH = 32, 4, 8


def mae_in_order(model: nn.Module, images: Tensor) -> Any:
    """Hugging Face's MAE encoder keeps every patch in its place when it is given ascending noise."""
    patch = model.config.patch_size
    count = (images.shape[-2] // patch) * (images.shape[-1] // patch)
    noise = torch.arange(count, device=images.device).float().expand(len(images), count)
    return model(images, noise=noise, interpolate_pos_encoding=True)


def masked_features(model: Any, images: Tensor) -> Any:
    """DINOv2's student in iBOT: some patches are replaced by the mask token."""
    masks = torch.zeros(len(images), 24, dtype=torch.bool)
    masks[:, [2, 3, 8, 9]] = True
    return model.forward_features(images, masks)


def two_crops(model: Any, images: Tensor) -> Any:
    """A global crop and a smaller one in a single call."""
    return model([images, images[..., :16, :16]])


def split_heads(x: Tensor, heads: int | None = None) -> Tensor:
    """(B, N, H·D) to (B, H, N, D)."""
    return x.unflatten(-1, (heads or HEADS, -1)).transpose(1, 2)


def mlp() -> nn.Module:
    """The feed-forward half of a block."""
    return nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


class Tokens(nn.Module):
    """Patch embedding by convolution, position embedding, and prefix tokens in front."""

    def __init__(self, grid: tuple[int, int] = (4, 6), prefix: int = 1) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, prefix, DIM)) if prefix else None
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1], DIM))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.proj(images).flatten(2).transpose(1, 2) + self.pos_embed
        x = x if mask is None else torch.where(mask[..., None], torch.zeros_like(x), x)
        return x if self.cls_token is None else torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)


class Packed(nn.Module):
    """Attention whose qkv come from one linear layer; ``attend(q, k, v)`` takes and gives (B, N, H, D)."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)  # (B, N, H, D)
        out: Tensor = self.proj(self.attend(q, k, v).flatten(2))
        return out


class Block(nn.Module):
    """A pre-norm block around any attention."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp = attn, mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PlainViT(nn.Module):
    """Tokens, blocks around the attention modules given, and a norm."""

    def __init__(self, *attention: nn.Module, prefix: int = 1, grid: tuple[int, int] = (4, 6)) -> None:
        super().__init__()
        self.patch_embed = Tokens(grid, prefix)
        self.blocks = nn.ModuleList(Block(a) for a in attention)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class DinoAttention(nn.Module):
    """Returns (x, attn)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = (DIM // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=True), nn.Linear(DIM, DIM)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c)), attn


class DinoViT(nn.Module):
    """DINO's student: `MultiCropWrapper` calls it; `get_last_selfattention` is its own way to a map."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Tokens()
        self.attn = nn.ModuleList(DinoAttention() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for norm, attn in zip(self.norms, self.attn, strict=True):
            x = x + attn(norm(x))[0]
        return x[:, 0]


class MemEffAttention(nn.Module):
    """Calls a memory-efficient kernel in (B, N, H, D), with the block-diagonal bias of packed crops if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias)
        return self.proj(out.transpose(1, 2).flatten(2))


class NestedTensorBlock(nn.Module):
    """Takes one tensor, or a list of crops which it packs into a single sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(DIM), MemEffAttention()
        self.gamma = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(x, Tensor):
            return x + self.gamma * self.attn(self.norm(x))
        lengths = [t.shape[1] for t in x for _ in range(t.shape[0])]
        packed = torch.cat([t.reshape(1, -1, DIM) for t in x], 1)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        packed = packed + self.gamma * self.attn(self.norm(packed), owner[:, None] == owner)
        parts = packed.split([t.shape[0] * t.shape[1] for t in x], 1)
        return [p.reshape(t.shape) for p, t in zip(parts, x, strict=True)]


class Dinov2ViT(nn.Module):
    """``forward(x, masks=None, is_training=False)`` with chunked blocks and a dictionary of features."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Tokens()
        self.mask_token = nn.Parameter(torch.zeros(1, DIM))
        self.blocks = nn.ModuleList(
            [nn.ModuleList([NestedTensorBlock()]), nn.ModuleList([nn.Identity(), NestedTensorBlock()])]
        )

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """A dictionary for one batch, a list of dictionaries for a list of crops."""
        several = isinstance(x, list)
        tokens = (
            [self.patch_embed(t, m) for t, m in zip(x, masks, strict=True)] if several else self.patch_embed(x, masks)
        )
        for chunk in self.blocks:
            for block in chunk:
                tokens = block(tokens)
        outs = [{"x_norm_clstoken": t[:, 0], "x_norm_patchtokens": t[:, 1:]} for t in (tokens if several else [tokens])]
        return outs if several else outs[0]

    def forward(self, x: Any, masks: Any = None, is_training: bool = False) -> Any:
        features = self.forward_features(x, masks)
        return features if is_training else features["x_norm_clstoken"]


def rope(x: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Rotate the patch tokens of (B, H, N, D) by their row (first half of D) and column (second half)."""
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    period = 10.0 ** -torch.arange(x.shape[-1] // 4)
    angle = torch.cat([rows.flatten()[:, None] * period, cols.flatten()[:, None] * period], 1).to(x.dtype)  # (N, D/2)
    even, odd = x[:, :, prefix:, 0::2], x[:, :, prefix:, 1::2]
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)
    return torch.cat([x[:, :, :prefix], turned.flatten(-2)], 2)


class RopeAttention(nn.Module):
    """Keeps its CLS and storage tokens unrotated."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor | list[Tensor], grid: Any) -> Any:
        if isinstance(x, list):
            return [self(t, g) for t, g in zip(x, grid, strict=True)]
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, -1))
        prefix = x.shape[1] - grid[0] * grid[1]
        out = F.scaled_dot_product_attention(rope(q, prefix, grid), rope(k, prefix, grid), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Dinov3ViT(nn.Module):
    """CLS, four storage tokens, patches; no position embedding but RoPE."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.storage_tokens = nn.Parameter(torch.randn(1, 4, DIM))
        self.blocks = nn.ModuleList(RopeAttention() for _ in range(2))
        self.norm = nn.LayerNorm(DIM)

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(x)
        prefix = torch.cat([self.cls_token, self.storage_tokens], 1).expand(len(x), -1, -1)
        return torch.cat([prefix, x.flatten(2).transpose(1, 2)], 1), (x.shape[2], x.shape[3])

    def forward(self, x: Any) -> Any:
        if not isinstance(x, list):
            return self.forward([x])[0]
        tokens, grids = zip(*(self._tokens(t) for t in x), strict=True)
        states = list(tokens)
        for block in self.blocks:
            states = [s + a for s, a in zip(states, block([self.norm(s) for s in states], list(grids)), strict=True)]
        return [{"x_norm_clstoken": s[:, 0]} for s in states]


class MultiHeadedDotAttention(nn.Module):
    """The explicit attention of the Annotated Transformer, as image captioning models still write it."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))
        self.d_k = DIM // HEADS

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        single = query.ndim == 2
        query = query[:, None] if single else query
        mask = mask.unsqueeze(1) if mask is not None else None
        q, k, v = (
            linear(x).view(len(query), -1, HEADS, self.d_k).transpose(1, 2)
            for linear, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        x = torch.matmul(F.softmax(scores, dim=-1), v)
        x = self.linears[-1](x.transpose(1, 2).contiguous().view(len(query), -1, HEADS * self.d_k))
        return x[:, 0] if single else x


class CaptionEncoder(nn.Module):
    """Self-attention over patches with a mask, then one pooling query: (B, C) in, (B, C) out."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Tokens(prefix=0)
        self.refine, self.pool = MultiHeadedDotAttention(), MultiHeadedDotAttention()

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        mask = torch.ones(len(x), 1, x.shape[1], dtype=torch.long)
        mask[..., -1] = 0  # one region is padding
        x = x + self.refine(x, x, x, mask)
        pooled: Tensor = self.pool(x.mean(1), x, x)
        return pooled


class EncoderViT(nn.Module):
    """`torch.nn.TransformerEncoder`, whose inference fast path computes attention out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Tokens()
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.encoder(self.patch_embed(images))
        return x[:, 0]


class TwiceViT(nn.Module):
    """One attention module used twice in a forward, as in ALBERT or in weight-tied students."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Tokens()
        self.block = Block(Packed(sdpa))

    def forward(self, images: Tensor) -> dict[str, Any]:
        x = self.block(self.block(self.patch_embed(images)))
        scale = torch.tensor(2.0) * torch.ones(()).exp()  # scalar operations must not disturb the observer
        return {"features": {"cls": x[:, 0] * scale, "all": [x]}, "step": 0}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention for (B, N, H, D)."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
