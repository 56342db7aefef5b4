"""Prompts and coordinates beside the image, tokens that are turned, thinned or halted, a batch in another order.

Each is right against a float64 truth by place, or refused for the reason that is the case.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attn_monitor.capture.recorder import record_attention
from tests.support.hostile_judge import Hostile, Judgement, judge
from tests.support.hostile_parts import Attention, Block, Net, Stem, matrix_of
from tests.support.hostile_tape import NOWHERE, moved, note, nowhere, register, tape
from tests.support.styles import DIM, HEADS, mlp, split_heads

GRID = (4, 6)
Change = Callable[[Tensor, int], Tensor]
"""``change(patches, sign)``: (B, N, C) turned, and with the sign -1 turned back."""

TURNS: dict[str, Change] = {
    "flip": lambda t, sign: t.flip(1),
    "roll": lambda t, sign: t.roll(5 * sign, 1),
    "roll on the grid": lambda t, sign: t.unflatten(1, GRID).roll((sign, 2 * sign), (1, 2)).flatten(1, 2),
    "mirror": lambda t, sign: t.unflatten(1, GRID).flip(2).flatten(1, 2),
    "transpose": lambda t, sign: t.unflatten(1, GRID if sign > 0 else GRID[::-1]).transpose(1, 2).flatten(1, 2),
}


class Turning(nn.Module):
    """Turns all tokens but the first, and the tape's places with them."""

    def __init__(self, turn: str) -> None:
        super().__init__()
        self.turn = turn

    def change(self, x: Tensor, sign: int) -> Tensor:
        """(B, 1 + N, C)."""
        return torch.cat([x[:, :1], TURNS[self.turn](x[:, 1:], sign)], 1)

    def turned(self, x: Tensor, sign: int) -> Tensor:
        """The same, noted."""
        moved(lambda places: self.change(places, sign))
        return self.change(x, sign)


class TurnedBranch(Turning):
    """A block whose attention alone runs on turned tokens."""

    def __init__(self, turn: str) -> None:
        super().__init__(turn)
        self.norm, self.attn, self.mlp = nn.LayerNorm(DIM), Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.turned(self.attn(self.norm(self.turned(x, 1))), -1)
        return x + self.mlp(x)


class TurnedBlock(Turning):
    """A block that runs on turned tokens as a whole."""

    def __init__(self, turn: str) -> None:
        super().__init__(turn)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(self.block(self.turned(x, 1)), -1)


class TurnedHeads(Turning):
    """Attention that turns q, k and v, and its result back."""

    def __init__(self, turn: str) -> None:
        super().__init__(turn)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        def places(p: Tensor) -> Tensor:
            return self.change(p[..., None], 1)[..., 0]

        q, k, v = (split_heads(self.change(t, 1)) for t in self.qkv(x).chunk(3, -1))
        a = matrix_of(q, k)
        out = note(self, a, v, a @ v, queries=places, keys=places)
        return self.proj(self.change(out.transpose(1, 2).flatten(2), -1))


class Prefix(nn.Module):
    """Learned keys and values that are attended beside the image's, before or after it; the results are added."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.first = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), first
        self.keys, self.values = (nn.Parameter(torch.randn(1, HEADS, 4, DIM // HEADS)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, -1))
        learned = tuple(t.expand(len(x), -1, -1, -1) for t in (self.keys, self.values))

        def attend(k: Tensor, v: Tensor) -> Tensor:
            a, of_image = matrix_of(q, k), v.shape[2] > 4
            keys = (lambda p: p) if of_image else (lambda p: nowhere(p, 4))
            return note(self, a, v, a @ v, keys=keys, alone=v if of_image else torch.zeros_like(q))

        results = [attend(*kv) for kv in ([learned, (k, v)] if self.first else [(k, v), learned])]
        return self.proj(sum(results).transpose(1, 2).flatten(2))


class Coordinates(nn.Module):
    """The weights also meet the keys' coordinates: where a query looks is added to its result."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.where = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(2, DIM // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, -1))
        number = torch.arange(x.shape[1], dtype=x.dtype)
        coordinates = torch.stack([number // GRID[1], number % GRID[1]], -1).expand(len(x), HEADS, -1, -1)
        a = matrix_of(q, k)
        out = note(self, a, v, a @ v) + self.where(a @ coordinates)
        return self.proj(out.transpose(1, 2).flatten(2))


class DeepPrompts(nn.Module):
    """Each block has prompts of its own, in the place of the last block's (VPT-deep)."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.prompts, self.block, self.first = nn.Parameter(torch.randn(1, 3, DIM)), Block(), first

    def forward(self, x: Tensor) -> Tensor:
        def change(t: Tensor, prompts: Tensor) -> Tensor:
            return torch.cat([t[:, :1], prompts.to(t).expand(len(t), -1, -1), t[:, 1 if self.first else 4 :]], 1)

        moved(lambda p: change(p, torch.tensor([register(i) for i in range(3)])[None, :, None]))
        return self.block(change(x, self.prompts))


class TwoWay(nn.Module):
    """SAM's decoder in one module: prompts attend to themselves and to the image, and the image to the prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(1, 5, DIM))
        self.layers, self.norms = nn.ModuleList(nn.Linear(DIM, 4 * DIM) for _ in range(3)), nn.LayerNorm(DIM)

    def attend(self, number: int, x: Tensor, y: Tensor) -> Tensor:
        """From x to y, (B, N, D) each."""
        q, k, v, out = self.layers[number].weight.chunk(4)
        q, k, v = split_heads(x @ q.T), split_heads(y @ k.T), split_heads(y @ v.T)
        places = [(lambda p: nowhere(p, 5)) if t.shape[1] == 5 else (lambda p: p) for t in (x, y)]
        a = matrix_of(q, k)
        return note(self, a, v, a @ v, queries=places[0], keys=places[1]).transpose(1, 2).flatten(2) @ out.T

    def forward(self, x: Tensor) -> Tensor:
        p = self.prompts.expand(len(x), -1, -1)
        p = self.norms(p + self.attend(0, p, p))
        p = self.norms(p + self.attend(1, p, x))
        return self.norms(x + self.attend(2, x, p))


class Hops(nn.Module):
    """A second attention reads what the first one gave, after ``between``; or its weights are used a second time."""

    def __init__(self, between: nn.Module | None = None, positions: bool = False, again: bool = False) -> None:
        super().__init__()
        self.qkv, self.between, self.again = nn.Linear(DIM, 3 * DIM), between or nn.Identity(), again
        self.positions = nn.Parameter(torch.randn(1 + 24, DIM // HEADS)) if positions else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, -1))
        first = matrix_of(q, k)
        between = self.between(first @ v)
        note(self, void="two hops")
        between = between if self.positions is None else between + self.positions
        if not self.again:
            note(self, void="two hops")
        return ((first if self.again else matrix_of(k, q)) @ between).transpose(1, 2).flatten(2)


class Reorganised(nn.Module):
    """EViT's block: the patches that CLS attends to most go on, in that order, and one token that fuses the others."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(DIM), nn.LayerNorm(DIM), mlp()
        self.qkv, self.proj, self.keep = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), keep

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        a = matrix_of(q, k)
        x = x + self.proj(note(self, a, v, a @ v).transpose(1, 2).flatten(2))
        score = a[:, :, 0, 1:].mean(1)
        index = score.argsort(1, descending=True)[..., None]

        def change(t: Tensor, fuse: Callable[[Tensor], Tensor]) -> Tensor:
            ranked = t[:, 1:].gather(1, index.expand(-1, -1, t.shape[-1]))
            return torch.cat([t[:, :1], ranked[:, : self.keep], fuse(ranked[:, self.keep :])], 1)

        rest = score.gather(1, index[..., 0])[:, self.keep :, None]
        moved(lambda p: change(p, lambda others: torch.full_like(others[:, :1], NOWHERE)))
        x = change(x, lambda others: (others * rest).sum(1, keepdim=True))
        return x + self.mlp(self.norm2(x))


class HaltingLayer(nn.Module):
    """Attention among the tokens that go on, and by how much each is nearer to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkvg = nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM)

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        *qkv, gate = self.qkvg(self.norm(x)).chunk(4, -1)
        q, k, v = (split_heads(t) for t in qkv)
        a = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~alive[:, None, None], -1e4).softmax(-1)
        x = x + note(self, a, v, a @ v).transpose(1, 2).flatten(2)
        return x, (x[..., 0] + gate[..., 0] - 1).sigmoid()


class Halting(nn.Module):
    """A-ViT: tokens that have seen enough are set to zero, and masked, from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = Stem(), nn.ModuleList(HaltingLayer() for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        total, alive = x.new_zeros(x.shape[:2]), x.new_ones(x.shape[:2], dtype=torch.bool)
        for layer in self.layers:
            x, step = layer(x * alive[..., None], alive)
            total = total + step
            alive = (total < 0.99) | (torch.arange(x.shape[1]) == 0)
        return x.mean(1)


class Rebatched(nn.Module):
    """The images run in another order inside, which is undone at the end."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.order = Net(Stem(), Block(), Block()), order

    def forward(self, images: Tensor) -> Tensor:
        index = self.order(torch.arange(len(images)))
        out = self.net(images[index])[index.argsort()]
        for truth in () if tape() is None else tape().truths:
            truth.void = "the images stand in another order"
        return out


def two(block: Callable[[], nn.Module], spec: str = "C*") -> Callable[[], nn.Module]:
    """A model of two such blocks, or attentions."""

    def build() -> nn.Module:
        steps = [block(), block()]
        return Net(Stem(spec), *(s if hasattr(s, "mlp") or isinstance(s, TurnedBlock) else Block(s) for s in steps))

    return build


RIGHT: dict[str, Callable[[], nn.Module]] = {
    **{f"attention on tokens turned by {t}": two(lambda t=t: TurnedBranch(t)) for t in TURNS},
    **{f"a block on tokens turned by {t}": two(lambda t=t: TurnedBlock(t)) for t in ("flip", "transpose")},
    **{f"q, k and v turned by {t}": two(lambda t=t: TurnedHeads(t)) for t in ("roll", "transpose")},
    "prompts after the image": two(lambda: Prefix(first=False)),
    "prompts before the image": two(lambda: Prefix(first=True)),
    "prompts in each block": lambda: Net(Stem(), DeepPrompts(first=True), DeepPrompts(), DeepPrompts()),
    "coordinates": two(Coordinates),
}

HOPS: dict[str, Callable[[], nn.Module]] = {
    "bare": two(Hops),
    "linear": two(lambda: Hops(nn.Linear(DIM // HEADS, DIM // HEADS))),
    "normalised": two(lambda: Hops(nn.LayerNorm(DIM // HEADS))),
    "with positions": two(lambda: Hops(positions=True)),
    "the same weights": two(lambda: Hops(again=True)),
}


def judged(build: Callable[[], nn.Module], must: str = "") -> list[Judgement]:
    return judge(Hostile("", "", build, must=must))


@pytest.mark.parametrize("name", RIGHT)
def test_what_stands_beside_the_image_or_is_turned_is_right(name: str) -> None:
    judgements = judged(RIGHT[name], must="all")
    assert [j for j in judgements if not j.fine] == []
    assert sum(j.verdict == "right" for j in judgements) >= 6


@pytest.mark.parametrize("name", HOPS)
def test_results_that_are_read_again_are_two_hops(name: str) -> None:
    judgements = judged(HOPS[name])
    assert {j.verdict for j in judgements} == {"refused"}
    assert any("it is one of two hops" in j.reason for j in judgements)
    assert not any("V) does not depend" in j.reason for j in judgements)


@pytest.mark.slow
def test_prompts_that_hold_results_are_no_second_hop() -> None:
    case = Hostile("", "", lambda: Net(Stem("*"), Block(), TwoWay(), Block()))
    judgements = {(j.layer, j.query): j for j in judge(case)}
    assert all(j.fine for j in judgements.values())
    assert judgements["blocks.2.attn", "mean"].verdict == "right"
    assert "does not depend on the image" in judgements["blocks.1", "mean"].reason
    assert "5 of its queries could be the CLS token, [0, 1, 2, 3, 4]" in judgements["blocks.1#1", "cls"].reason
    assert "depends on the image through other attention alone" in judgements["blocks.1#2", "mean"].reason
    truth = case.truths()["blocks.1#1"].matrix
    for prompt in range(5):
        (got,) = record_attention(case.model(), case.images(), layers=2, query=prompt)
        torch.testing.assert_close(got.maps.flatten(-2).double(), truth[:, :, prompt], rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", [lambda: Net(Stem(), Reorganised(12), Reorganised(6)), Halting])
def test_thinned_tokens_are_refused_for_what_was_seen(build: Callable[[], nn.Module]) -> None:
    first, *others = (j for j in judged(build) if j.query == "mean")
    assert first.verdict == "right"
    assert {j.verdict for j in others} == {"refused"}
    assert "they are no grid of patches" in others[-1].reason


@pytest.mark.parametrize(
    "order", [lambda n: n.flip(0), lambda n: n.roll(1), lambda n: torch.cat([n[:-2], n[-2:].flip(0)])]
)
def test_a_batch_in_another_order_is_not_called_random(order: Callable[[Tensor], Tensor]) -> None:
    judgements = judged(lambda: Rebatched(order))
    assert judgements
    assert all(j.verdict == "refused" and "in another order before it attends" in j.reason for j in judgements)
    assert not any("random" in j.reason for j in judgements)
