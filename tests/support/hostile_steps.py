"""Steps between the blocks of hostile models: pooling, merging, leaving out, and tokens from elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.hostile_parts import matrix_of, scores
from tests.support.hostile_tape import CLS, Grid, arrange, cells, moved, note, nowhere
from tests.support.styles import DIM, split_heads


class Pooled(nn.Module):
    """Keys, or queries, or both, are means of 2×2 tokens; CLS, if any, stays as it is (PVT, MViT).

    Where queries are pooled, so are the tokens from here on.
    """

    def __init__(
        self, grid: Grid = (4, 6), keep: int = 0, q: bool = False, kv: bool = True, conv: bool = False
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))
        self.pool = nn.Conv2d(DIM, DIM, 2, 2) if conv else nn.AvgPool2d(2)
        self.grid, self.keep, self.pools = grid, keep, (q, kv)

    def pooled(self, x: Tensor) -> Tensor:
        """Tokens of the coarse grid."""
        image = x[:, self.keep :].mT.unflatten(-1, self.grid)
        return torch.cat([x[:, : self.keep], self.pool(image).flatten(2).mT], 1)

    def forward(self, x: Tensor) -> Tensor:
        coarse, (q_, kv) = (self.grid[0] // 2, self.grid[1] // 2), self.pools

        def places(p: Tensor) -> Tensor:
            return torch.cat([p[:, : self.keep], cells(p, coarse)], 1)

        xq, xk = (self.pooled(x) if q_ else x), (self.pooled(x) if kv else x)
        q, k, v = split_heads(self.q(xq)), split_heads(self.k(xk)), split_heads(self.v(xk))
        a = matrix_of(q, k)
        out = note(
            self,
            a,
            v,
            a @ v,
            queries=places if q_ else lambda p: p,
            keys=places if kv else lambda p: p,
            grid=coarse if kv else None,
            query_grid=coarse if q_ else None,
        )
        if q_:
            moved(lambda p: places(p[..., 0])[..., None], coarse)
        return self.proj(out.transpose(1, 2).flatten(2))


class Merge(nn.Module):
    """Each 2×2 tokens become one (Swin's by concatenation, PiT's by convolution); CLS is kept."""

    def __init__(self, grid: Grid = (4, 6), keep: int = 0, conv: bool = False) -> None:
        super().__init__()
        self.grid, self.keep = grid, keep
        self.down = nn.Conv2d(DIM, DIM, 3, 2, 1, groups=DIM) if conv else nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        coarse = (self.grid[0] // 2, self.grid[1] // 2)
        image = x[:, self.keep :].mT.unflatten(-1, self.grid)
        if isinstance(self.down, nn.Conv2d):
            tokens = self.down(image).flatten(2).mT
        else:
            tokens = self.down(F.pixel_unshuffle(image, 2).flatten(2).mT)
        moved(lambda p: torch.cat([p[:, : self.keep], cells(p[..., 0], coarse)[..., None]], 1), coarse)
        return torch.cat([x[:, : self.keep], tokens], 1)


class Convolve(nn.Module):
    """A depthwise 3×3 convolution over the patch tokens between two blocks, CLS left out."""

    def __init__(self, grid: Grid = (4, 6), keep: int = 1) -> None:
        super().__init__()
        self.conv, self.grid, self.keep = nn.Conv2d(DIM, DIM, 3, 1, 1, groups=DIM), grid, keep

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, self.keep :].mT.unflatten(-1, self.grid)
        return torch.cat([x[:, : self.keep], x[:, self.keep :] + self.conv(image).flatten(2).mT], 1)


class Keep(nn.Module):
    """Only some tokens go on: those of the highest scores, or a random half, or each second one."""

    def __init__(self, count: int, how: str = "score", keep: int = 1) -> None:
        super().__init__()
        self.count, self.how, self.keep = count, how, keep

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.keep :]
        score = {
            "score": lambda: patches[..., 0],
            "random": lambda: torch.rand(patches.shape[:2]),
            "fixed": lambda: -(torch.arange(patches.shape[1]) % 2).expand(patches.shape[:2]).double(),
        }[self.how]()
        index = score.argsort(dim=1, descending=True, stable=True)[:, : self.count].sort(1).values[..., None]

        def change(t: Tensor) -> Tensor:
            rest = t[:, self.keep :]
            return torch.cat([t[:, : self.keep], rest.gather(1, index.expand(-1, -1, rest.shape[-1]))], 1)

        moved(change)
        return change(x)


class MergeSimilar(nn.Module):
    """ToMe: the ``count`` tokens at even places most like their right neighbours are averaged into them."""

    def __init__(self, count: int = 6, keep: int = 1) -> None:
        super().__init__()
        self.count, self.keep = count, keep

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.keep :]
        left, right = patches[:, 0::2], patches[:, 1::2]
        rank = F.cosine_similarity(left, right, dim=-1).argsort(1, descending=True)[..., None]
        merged, alone = rank[:, : self.count], rank[:, self.count :]

        def change(t: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            even, odd = t[:, self.keep :][:, 0::2], t[:, self.keep :][:, 1::2]
            to, rest = merged.expand(-1, -1, t.shape[-1]), alone.expand(-1, -1, t.shape[-1])
            odd = odd.scatter(1, to, join(even.gather(1, to), odd.gather(1, to)))
            return torch.cat([t[:, : self.keep], even.gather(1, rest), odd], 1)

        moved(lambda p: change(p, lambda a, b: nowhere(a[..., 0])[..., None]))
        return change(x, lambda a, b: (a + b) / 2)


class FromLatents(nn.Module):
    """Learned queries read from the tokens and go on in their place; ``context`` adds them to the keys (Flamingo)."""

    def __init__(self, count: int = 24, context: bool = False, single: bool = False) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, count, DIM))
        self.q, self.kv, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.context, self.single = context, single

    def forward(self, x: Tensor) -> Tensor:
        count, latents = self.latents.shape[1], self.latents.expand(len(x), -1, -1)
        k, v = self.kv(torch.cat([x, latents], 1) if self.context else x).chunk(2, -1)
        q, k, v = (split_heads(t) for t in (self.q(latents), k, v))

        def places(p: Tensor) -> Tensor:
            return torch.full((len(p), 1), CLS) if self.single else nowhere(p, count)

        a = matrix_of(q, k)
        keys = (lambda p: torch.cat([p, places(p)], 1)) if self.context else (lambda p: p)
        out = note(self, a, v, a @ v, queries=places, keys=keys)
        moved(lambda p: places(p[..., 0])[..., None])
        return latents + self.proj(out.transpose(1, 2).flatten(2))


class FromText(nn.Module):
    """Patches attend to words, as many as there are patches."""

    def __init__(self, count: int = 24) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(1, count, DIM))
        self.q, self.kv, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(self.words.expand(len(x), -1, -1)).chunk(2, -1)
        q, k, v = (split_heads(t) for t in (self.q(x), k, v))
        a = matrix_of(q, k)
        out = note(self, a, v, a @ v, keys=lambda p: nowhere(p, self.words.shape[1]))
        return x + self.proj(out.transpose(1, 2).flatten(2))


class Slots(nn.Module):
    """Slots that start from the image's mean compete for the tokens, twice, and go on in their place."""

    def __init__(self, count: int = 24) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, count, DIM))
        self.q, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.start + x.mean(1, keepdim=True)
        k, v = (split_heads(t, 1) for t in self.kv(x).chunk(2, -1))
        for _ in range(2):
            a = scores(split_heads(self.q(slots), 1), k).softmax(-2) + 1e-8
            a = a / a.sum(-1, keepdim=True)
            out = note(self, a, v, a @ v, queries=lambda p: nowhere(p, self.start.shape[1]))
            slots = slots + out.transpose(1, 2).flatten(2)
        moved(lambda p: nowhere(p[..., 0], self.start.shape[1])[..., None])
        return slots


class ClassAttention(nn.Module):
    """Only CLS asks (CaiT): it stands at ``at``, or is learned here if None; keys with or without itself."""

    def __init__(self, itself: bool = True) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.itself = itself

    def forward(self, x: Tensor) -> Tensor:
        first = 0 if self.itself else 1
        k, v = self.kv(x[:, first:]).chunk(2, -1)
        q, k, v = (split_heads(t) for t in (self.q(x[:, :1]), k, v))
        a = matrix_of(q, k)
        out = note(self, a, v, a @ v, queries=lambda p: p[:, :1], keys=lambda p: p[:, first:])
        return torch.cat([x[:, :1] + self.proj(out.transpose(1, 2).flatten(2)), x[:, 1:]], 1)


class Insert(nn.Module):
    """Tokens come in after some blocks: ``spec`` as for a stem, with "*" for the tokens that are there."""

    def __init__(self, spec: str, place: Callable[[int], int] = lambda i: CLS, name: str = "cls_token") -> None:
        super().__init__()
        self.spec, self.place, self.name = spec, place, name
        setattr(self, name, nn.Parameter(torch.randn(1, len(spec) - 1, DIM)))

    def forward(self, x: Tensor) -> Tensor:
        token = getattr(self, self.name)

        def places(p: Tensor) -> Tensor:
            return arrange(self.spec, p, lambda c, i: torch.full((len(p), 1, 1), self.place(i)))

        moved(places)
        return arrange(self.spec, x, lambda c, i: token[:, i : i + 1].expand(len(x), -1, -1))


class AddClass(nn.Module):
    """CLS is added to every patch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, 1:] + x[:, :1]], 1)
