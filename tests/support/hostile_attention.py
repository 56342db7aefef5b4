"""Attention in ways that mislead: for `hostile_parts.Attention`, or modules that take and give the same tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.hostile_parts import Attend, matrix_of, plain, scores
from tests.support.hostile_tape import Grid, Order, note, nowhere, only_queries, tape
from tests.support.styles import DIM, HEADS, split_heads


def einsum(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both products by einsum."""
    a = (torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return note(m, a, v, torch.einsum("bhqk,bhkd->bhqd", a, v))


def folded(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B·H) in one dimension, the scores by baddbmm."""
    b, h, n, d = q.shape
    q_, k_, v_ = (t.reshape(b * h, -1, d) for t in (q, k, v))
    a = torch.baddbmm(q_.new_zeros(1, 1, 1), q_, k_.mT, beta=0, alpha=d**-0.5).softmax(-1)
    out = (a @ v_).view(b, h, n, d)
    return note(m, a.view(b, h, n, -1), v, out)


def heads_first(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H·B) in one dimension."""
    b, h, n, d = q.shape
    q_, k_, v_ = (t.transpose(0, 1).reshape(h * b, -1, d) for t in (q, k, v))
    a = torch.bmm(q_, k_.mT * d**-0.5).softmax(-1)
    out = torch.bmm(a, v_).view(h, b, n, d).transpose(0, 1)
    return note(m, a.view(h, b, n, -1).transpose(0, 1), v, out)


def heads_outside(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H, B, N, D) throughout."""
    q_, k_, v_ = (t.transpose(0, 1) for t in (q, k, v))
    a = matrix_of(q_, k_)
    return note(m, a.transpose(0, 1), v, (a @ v_).transpose(0, 1))


def values_on_the_left(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Vᵀ Aᵀ, with channels before tokens."""
    a = scores(q, k).softmax(-1)
    return note(m, a, v, (v.mT @ a.mT).mT)


def chunked(size: int, attend: Attend = plain) -> Attend:
    """Queries a few at a time, the last ones in a smaller chunk."""

    def attend_to_parts(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, start = [], 0
        for part in q.split(size, 2):
            here = slice(start, start := start + part.shape[2])
            out.append(attend(m, part, k, v))
            only_queries(lambda p, here=here: p[:, here])
        return torch.cat(out, 2)

    return attend_to_parts


def queries_in(order: Order, keep: int, back: bool) -> Attend:
    """Queries in another order than keys; the results put back, or not."""

    def attend(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = torch.arange(q.shape[2])[None, :, None]
        index = torch.cat([index[:, :keep], order(index[:, keep:], index[:, keep:])], 1)[0, :, 0]
        a = matrix_of(q[:, :, index], k)
        void = "" if back else "results are put at other tokens than their queries"
        out = note(m, a, v, a @ v, queries=lambda p: p[:, index], void=void, alone=v[:, :, index])
        return out[:, :, index.argsort()] if back else out

    return attend


def rolled(q: int = 0, v: int = 0, out: int = 0, flip: bool = False) -> Attend:
    """Q, V or the result stand at other tokens than K."""

    def attend(m: nn.Module, q_: Tensor, k: Tensor, v_: Tensor) -> Tensor:
        done = matrix_of(q_.roll(q, 2), k) @ v_.roll(v, 2)
        done = done.flip(2) if flip else done
        return note(m, out=done.roll(out, 2), void="Q, V or the result stand at other tokens than K")

    return attend


def two_hops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A₁(A₂V)."""
    return matrix_of(q, k) @ (matrix_of(k, q) @ v)


def split_differently(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two attentions of one V, subtracted after their products."""
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    return matrix_of(q1, k1) @ v - 0.5 * (matrix_of(q2, k2) @ v)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two attentions of one V, added."""
    return matrix_of(q, k) @ v + matrix_of(k, q) @ v


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention of two softmaxes: channels attend to tokens, and tokens to channels."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dropout that stays on."""
    return F.dropout(matrix_of(q, k), 0.3, True) @ v


def differential(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A₁ - λA₂ is one matrix, with negative entries."""
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    a = matrix_of(q1, k1) - 0.5 * matrix_of(q2, k2)
    return note(m, a, v, a @ v)


def gated(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Content and fixed positions mixed, as in ConViT."""
    n = k.shape[2]
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs().to(q.dtype)
    a = 0.6 * matrix_of(q, k) + 0.4 * (-distance).softmax(-1)
    return note(m, a, v, a @ v)


def from_positions(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """V knows positions only: no key holds a part of the image."""
    n, d = v.shape[-2:]
    fixed = torch.sin(torch.arange(n)[:, None] * torch.arange(1, d + 1) * 0.7).to(v.dtype).expand_as(v)
    a = matrix_of(q, k)
    return note(m, a, fixed, a @ fixed, keys=nowhere)


def from_means(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """V is the same for all keys: the image's mean."""
    a, mean = matrix_of(q, k), v.mean(2, keepdim=True).expand_as(v)
    return note(m, a, mean, a @ mean, keys=nowhere)


def from_next_image(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """V is another image's: no key holds a part of the image."""
    a, other = matrix_of(q, k), v.roll(1, 0)
    return note(m, a, other, a @ other, keys=nowhere)


def on_channels(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XCiT's: channels attend to channels, here as many as tokens."""
    a = matrix_of(F.normalize(q.mT, dim=-1), F.normalize(k.mT, dim=-1))
    return note(m, a, v.mT, a @ v.mT, keys=nowhere, queries=nowhere).mT


def over_queries_alone(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Columns, not rows, of the matrix are the softmax's."""
    a = scores(q, k).softmax(-2)
    return note(m, a, v, a @ v)


def over_queries(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slot attention: queries compete for keys, then rows are renormalised."""
    a = scores(q, k).softmax(-2)
    a = a / a.sum(-1, keepdim=True)
    return note(m, a, v, a @ v)


def dilated(grid: Grid, fold: str) -> Attend:
    """Each 2×2 offset of the grid attends within itself; the offsets are folded into the heads or the batch."""
    return _parts(lambda t: t.unflatten(2, (grid[0] // 2, 2, grid[1] // 2, 2)).permute(0, 3, 5, 1, 2, 4, 6), fold)


def windowed(grid: Grid, window: Grid, fold: str) -> Attend:
    """Windows attend within themselves."""
    (gh, gw), (wh, ww) = grid, window
    return _parts(lambda t: t.unflatten(2, (gh // wh, wh, gw // ww, ww)).permute(0, 2, 4, 1, 3, 5, 6), fold)


def _parts(split: Callable[[Tensor], Tensor], fold: str) -> Attend:
    def attend(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        parts = [split(t) for t in (q, k, v)]  # (B, parts, parts, H, rows, columns, D)
        b, one, two, h, rows, columns, d = parts[0].shape
        shape = (b, one * two * h, rows * columns, d) if fold == "heads" else (b * one * two, h, rows * columns, d)
        q_, k_, v_ = (t.reshape(shape) for t in parts)
        out = (matrix_of(q_, k_) @ v_).reshape(b, one * two, h, -1, d)
        numbers = split(torch.arange(n)[None, None, :, None].expand(1, 1, -1, 1)).reshape(one * two, -1)
        whole = torch.empty_like(q)
        for i, where in enumerate(numbers):
            whole[:, :, where] = out[:, i]
        return note(m, out=whole, void="parts of the image attend within themselves")

    return attend


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All images in one sequence, under a mask."""
    b, n = len(q), q.shape[2]
    owner = torch.arange(b).repeat_interleave(n)
    q_, k_, v_ = (t.transpose(0, 1).flatten(1, 2) for t in (q, k, v))  # (H, B·N, D)
    a = scores(q_, k_).masked_fill(owner[:, None] != owner, float("-inf")).softmax(-1)
    return (a @ v_).unflatten(1, (b, n)).transpose(0, 1)


class Product(nn.Module):
    """A·V as a module of its own."""

    def forward(self, a: Tensor, v: Tensor) -> Tensor:
        return note(self, a, v, a @ v)


class Score(nn.Module):
    """The softmax as a module of its own."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return matrix_of(q, k)


class Apart(nn.Module):
    """Scores and product in different modules."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.score, self.product = Score(), Product()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, -1))
        return self.proj(self.product(self.score(q, k), v).transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    """nn.MultiheadAttention, batch first or sequence first."""

    def __init__(self, batch_first: bool = True, need_weights: bool = False) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.batch_first, self.need_weights = batch_first, need_weights

    def forward(self, x: Tensor) -> Tensor:
        t = x if self.batch_first else x.transpose(0, 1)
        out = self.mha(t, t, t, need_weights=self.need_weights, average_attn_weights=False)[0]
        out = out if self.batch_first else out.transpose(0, 1)
        if tape() is not None:
            q, k, v = (split_heads(u) for u in F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias).chunk(3, -1))
            a = matrix_of(q, k)
            torch.testing.assert_close(self.mha.out_proj((a @ v).transpose(1, 2).flatten(2)), out)
            note(self.mha, a)
        return out


class SequenceFirst(nn.Module):
    """(N, B, E) and bmm over (B·H), as fairseq has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x.transpose(0, 1)).chunk(3, -1)
        q, k, v = (t.contiguous().view(n, b * HEADS, -1).transpose(0, 1) for t in (q * (DIM // HEADS) ** -0.5, k, v))
        a = torch.bmm(q, k.mT).softmax(-1)
        out = torch.bmm(a, v)
        note(self, a.view(b, HEADS, n, n), v.view(b, HEADS, n, -1), out.view(b, HEADS, n, -1))
        return self.proj(out.transpose(0, 1).reshape(n, b, DIM)).transpose(0, 1)
