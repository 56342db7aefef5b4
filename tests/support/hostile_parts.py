"""Parts of hostile models: patch embeddings, what moves tokens, plain attention, blocks, and models of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.hostile_tape import Grid, Order, arrange, begin, moved, note
from tests.support.styles import DIM, HEADS, PATCH, mlp, split_heads


class Reorder(nn.Module):
    """Put the tokens after the first ``keep`` in another order."""

    def __init__(self, order: Order, keep: int = 1, void: str = "") -> None:
        super().__init__()
        self.order, self.keep, self.void = order, keep, void

    def forward(self, x: Tensor) -> Tensor:
        def change(t: Tensor) -> Tensor:
            return torch.cat([t[:, : self.keep], self.order(x[:, self.keep :], t[:, self.keep :])], 1)

        moved(change, void=self.void)
        return change(x)


class Around(nn.Module):
    """A block whose tokens are put in another order before it, and back after it."""

    def __init__(self, block: nn.Module, order: Order, keep: int = 1) -> None:
        super().__init__()
        self.block, self.order, self.keep = block, order, keep

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(x.shape[1])[None, :, None].expand(len(x), -1, 1)
        index = torch.cat([count[:, : self.keep], self.order(x[:, self.keep :], count[:, self.keep :])], 1)
        back = index.argsort(1)
        moved(lambda t: t.gather(1, index))
        x = self.block(x.gather(1, index.expand_as(x)))
        moved(lambda t: t.gather(1, back))
        return x.gather(1, back.expand_as(x))


class Do(nn.Module):
    """Any function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SqueezeExcite(nn.Module):
    """Channels scaled by what the whole image says."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


def conv(kernel: int = PATCH, stride: int = PATCH, padding: int = 0, channels: int = 3) -> nn.Conv2d:
    """A convolution to DIM channels."""
    return nn.Conv2d(channels, DIM, kernel, stride, padding)


class TwoPhases(nn.Module):
    """An embedding whose columns overlap by half: one disjoint convolution, run again half a patch to the right."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = conv()

    def forward(self, x: Tensor) -> Tensor:
        half = PATCH // 2
        even, odd = self.proj(x), self.proj(x[..., half:-half])  # (B, C, gh, gw), (B, C, gh, gw - 1)
        pairs = torch.stack([even[..., :-1], odd], -1).flatten(-2)
        return torch.cat([pairs, even[..., -1:]], -1)


class Stem(nn.Module):
    """Patch embedding, position embedding, and other tokens where ``spec`` says.

    C: ``cls_token``; T: a CLS whose name is ``token``; R: ``register_tokens``; M: CLS as the mean of the patches; I:
    CLS of ``cls_token`` and the image; G: a register computed from the image. ``order``: in which order the tokens hold
    the parts of the image, where the embedding is not row by row.
    """

    def __init__(
        self,
        spec: str = "C*",
        embed: nn.Module | None = None,
        grid: Grid = (4, 6),
        order: Order | None = None,
        void: str = "",
        dim: int = DIM,
    ) -> None:
        super().__init__()
        self.spec, self.grid, self.order, self.void = spec, grid, order, void
        self.embed = embed or conv()
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1], dim))
        for letter, name in (("CI", "cls_token"), ("T", "token"), ("R", "register_tokens")):
            if count := sum(spec.count(c) for c in letter):
                setattr(self, name, nn.Parameter(torch.randn(1, count, dim)))

    def special(self, letter: str, i: int, x: Tensor) -> Tensor:
        """One token (B, 1, D) that is not a patch."""
        if letter == "M":
            return x.mean(1, keepdim=True)
        if letter == "G":
            return x.amax(1, keepdim=True)
        token = getattr(self, {"C": "cls_token", "I": "cls_token", "T": "token", "R": "register_tokens"}[letter])
        token = token[:, i : i + 1].expand(len(x), -1, -1)
        return token + x.mean(1, keepdim=True) if letter == "I" else token

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        x = x + self.pos_embed
        begin(self.spec, self.grid, len(x), self.order, self.void)
        return arrange(self.spec, x, lambda c, i: self.special(c, i, x))


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products."""
    return q @ k.mT * q.shape[-1] ** -0.5


def matrix_of(q: Tensor, k: Tensor) -> Tensor:
    """Softmax attention."""
    return scores(q, k).softmax(-1)


Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""``attend(module, q, k, v)``: (B, H, N, D) each, as is the result."""


def plain(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Explicit."""
    a = matrix_of(q, k)
    return note(m, a, v, a @ v)


def fused(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own."""
    return note(m, lambda: matrix_of(q, k), v, F.scaled_dot_product_attention(q, k, v))


def after(change: Callable[[Tensor], Tensor], void: str = "") -> Attend:
    """The softmax is changed before it meets V."""

    def attend(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = change(matrix_of(q, k))
        return note(m, a, None if void else v, a @ v, void=void)

    return attend


def instead(matrix: Callable[[Tensor], Tensor]) -> Attend:
    """Something else than a softmax of the scores."""

    def attend(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = matrix(scores(q, k))
        return note(m, a, v, a @ v)

    return attend


def without_map(compute: Callable[[Tensor, Tensor, Tensor], Tensor], why: str) -> Attend:
    """Attention of which no map is true."""
    return lambda m, q, k, v: note(m, None, None, compute(q, k, v), void=why)


class Attention(nn.Module):
    """q, k and v from one linear layer, and any way to attend."""

    def __init__(self, attend: Attend = plain, heads: int = HEADS, dim: int = DIM, share_kv: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attend, self.heads, self.share_kv = attend, heads, share_kv

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, -1))
        out = self.attend(self, q, k, k if self.share_kv else v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block; ``scale`` multiplies the attention's result, ``sort`` is the order that it asks for."""

    def __init__(
        self,
        attn: nn.Module | Attend = plain,
        norm: str = "pre",
        residual: bool = True,
        scale: float | None = None,
        sort: Order | None = None,
        keep: int = 1,
    ) -> None:
        super().__init__()
        self.attn = attn if isinstance(attn, nn.Module) else Attention(attn)
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(DIM), nn.LayerNorm(DIM), mlp()
        self.norm, self.residual, self.scale, self.sort, self.keep = norm, residual, scale, sort, keep
        self.gamma = nn.Parameter(torch.ones(DIM)) if scale is not None else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x) if self.norm == "pre" else x)
        a = a if self.gamma is None else self.scale * self.gamma * a
        x = x + a if self.residual else a
        if self.sort is not None:
            keep, order = self.keep, self.sort

            def change(t: Tensor) -> Tensor:
                return torch.cat([t[:, :keep], order(a[:, keep:], t[:, keep:])], 1)

            moved(change)
            x = change(x)
        x = self.norm1(x) if self.norm == "post" else x
        out = self.mlp(self.norm2(x))
        return x + out if self.residual else out


class Net(nn.Module):
    """A stem, then steps."""

    def __init__(self, stem: nn.Module, *steps: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.ModuleList(steps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for step in self.blocks:
            x = step(x)
        return x.mean(1)


class Both(nn.Module):
    """Several models on the same images."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        return sum(m(images) for m in self.models)


class Views(nn.Module):
    """The same model on several views of an image; ``order`` or ``void`` says what a view's tokens hold."""

    def __init__(self, model: Net, *views: tuple[Callable[[Tensor], Tensor], Order | None, str]) -> None:
        super().__init__()
        self.model, self.views = model, views

    def forward(self, images: Tensor) -> Tensor:
        out = []
        for view, order, void in self.views:
            stem = self.model.stem
            stem.order, stem.void = order, void
            out.append(self.model(view(images)))
        return torch.stack(out).sum(0)


def blocks(*styles: Any, count: int = 2, **settings: Any) -> Sequence[nn.Module]:
    """Blocks of these styles of attention, or ``count`` of one."""
    return [Block(s, **settings) for s in (styles if len(styles) > 1 else (styles or (plain,)) * count)]
