"""Hostile models: each kind of construction that once got a map which was accepted and wrong, and their kin.

``python -m tests.support.hostile [words of a name or kind]`` prints a line for each layer and query, and counts.
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import hostile_attention as at
from tests.support import hostile_steps as go
from tests.support.hostile_judge import Hostile, Judgement, judge
from tests.support.hostile_orders import (
    by,
    column_major,
    drawn,
    fixed,
    mirror,
    on_grid,
    reverse,
    rolled_by,
    shift,
    windows,
)
from tests.support.hostile_parts import (
    Around,
    Attention,
    Block,
    Both,
    Do,
    Net,
    Reorder,
    SqueezeExcite,
    Stem,
    TwoPhases,
    Views,
    after,
    blocks,
    conv,
    fused,
    instead,
    plain,
    without_map,
)
from tests.support.hostile_tape import Grid, register
from tests.support.styles import DIM, PATCH


def vit(spec: str = "C*", *styles: object, count: int = 2, **stem: object) -> Net:
    """A stem and plain blocks around these styles of attention."""
    return Net(Stem(spec, **stem), *blocks(*styles, count=count))


def between(order: object, keep: int = 1, spec: str = "C*", void: str = "", **stem: object) -> Net:
    """The order changes between two blocks."""
    return Net(Stem(spec, **stem), Block(), Reorder(order, keep, void), Block())


def with_stem(*embed: nn.Module, spec: str = "C*", **stem: object) -> Net:
    """Plain blocks after a patch embedding of several modules."""
    return vit(spec, embed=nn.Sequential(*embed), **stem)


def step(*steps: nn.Module, spec: str = "*") -> Net:
    """A block, these steps, a block."""
    return Net(Stem(spec), Block(), *steps, Block())


def cases(kind: str, table: dict[str, Callable[[], nn.Module]], **settings: object) -> list[Hostile]:
    """Cases of one kind that may and must do the same."""
    return [Hostile(name, kind, build, **settings) for name, build in table.items()]


G: Grid = (4, 6)
RANDOM = "another order in each forward"


def nudge_first(t: Tensor) -> Tensor:
    """The first token goes to the middle."""
    return torch.cat([t[:, 1 : t.shape[1] // 2], t[:, :1], t[:, t.shape[1] // 2 :]], 1)


def serpentine(t: Tensor) -> Tensor:
    """Each second row of (B, gh, gw, C) runs from right to left."""
    return torch.stack([row.flip(1) if i % 2 else row for i, row in enumerate(t.unbind(1))], 1)


def zoom(x: Tensor) -> Tensor:
    """The image's middle, enlarged."""
    return F.interpolate(x[..., 8:24, 12:36], size=x.shape[-2:], mode="bilinear")


def heads_scaled(a: Tensor) -> Tensor:
    """Each head by its own factor, one of them pruned."""
    return a * torch.tensor([0.5, 0.0, 1.3, 0.9], dtype=a.dtype)[:, None, None]


def far_masked(a: Tensor) -> Tensor:
    """Keys far away in the sequence are masked after the softmax."""
    n = torch.arange(a.shape[-1])
    return a * ((n[:, None] - n).abs() < 12)


def talking(a: Tensor) -> Tensor:
    """Heads mixed by a fixed matrix."""
    mix = torch.randn(a.shape[1], a.shape[1], generator=torch.Generator().manual_seed(2)).to(a.dtype)
    return torch.einsum("gh,bhqk->bgqk", mix, a)


def top(a: Tensor, count: int = 8) -> Tensor:
    """Only the largest weights, renormalised."""
    kept = a * (a >= a.topk(count, -1).values[..., -1:])
    return kept / kept.sum(-1, keepdim=True)


def sigmoid(s: Tensor) -> Tensor:
    """No competition among keys."""
    return (s - 2.0).sigmoid()


def with_sink(s: Tensor) -> Tensor:
    """Softmax with one more score of zero, as if there were a key of no value."""
    return torch.cat([s, torch.zeros_like(s[..., :1])], -1).softmax(-1)[..., :-1]


CASES = [
    *cases(
        "coding",
        {
            "explicit softmax": vit,
            "fused": lambda: vit("C*", fused),
            "einsum": lambda: vit("C*", at.einsum),
            "baddbmm over BH": lambda: vit("C*", at.folded),
            "bmm over HB": lambda: vit("C*", at.heads_first),
            "values on the left": lambda: vit("C*", at.values_on_the_left, fused),
            "nn.MultiheadAttention": lambda: vit("C*", at.Multihead(), at.Multihead(need_weights=True)),
            "sequence first": lambda: vit("C*", at.SequenceFirst(), at.Multihead(batch_first=False)),
        },
        must="all",
    ),
    *cases("coding", {"one key and value for all": lambda: vit("C*", Attention(share_kv=True), Attention(fused))}),
    *cases("coding", {"scores and product in two modules": lambda: vit("C*", at.Apart(), at.Apart())}),
    *cases(
        "coding with B equal to H",
        {
            "H, B": lambda: vit("C*", at.heads_outside, at.heads_outside),
            "bmm over HB": lambda: vit("C*", at.heads_first),
            "baddbmm over BH": lambda: vit("C*", at.folded),
        },
        count=4,
    ),
    *cases(
        "prefix",
        {
            "registers before CLS": lambda: vit("RRRRC*"),
            "one prompt before CLS": lambda: vit("RC*", fused),
            "registers after CLS": lambda: vit("CRR*"),
            "CLS last": lambda: vit("*C"),
            "registers first, CLS last": lambda: vit("RR*C"),
            "CLS in the middle": lambda: vit("<C>"),
        },
        must="all",
    ),
    *cases(
        "prefix without one CLS",
        {
            "two class tokens": lambda: vit("CC*"),
            "four class tokens": lambda: vit("CCCC*", fused),
            "class tokens at both ends": lambda: vit("C*C"),
            "registers only": lambda: vit("RR*"),
            "patches only": lambda: vit("*"),
        },
        must="mean patch",
    ),
    *cases(
        "prefix hard to know",
        {
            "CLS named token": lambda: vit("T*"),
            "CLS named token among registers": lambda: vit("RTR*"),
            "CLS is the mean of patches": lambda: vit("M*"),
            "CLS and the image": lambda: vit("I*"),
            "a register from the image": lambda: vit("CG*"),
            "CLS after a block": lambda: step(go.Insert("C*")),
            "prompts come in before CLS": lambda: step(go.Insert("RR*", register, "prompts"), spec="C*"),
            "class attention": lambda: Net(
                Stem("*"), Block(), go.Insert("C*"), go.ClassAttention(), go.ClassAttention(itself=False)
            ),
            "CLS added to every patch": lambda: Net(Stem(), go.AddClass(), Block(), go.AddClass(), Block()),
        },
    ),
    *cases(
        "CLS moves",
        {
            "to the end": lambda: between(shift(-1), 0),
            "to the middle": lambda: between(lambda x, t: nudge_first(t), 0),
            "with all reversed": lambda: between(reverse, 0),
            "changes places with a register": lambda: between(
                lambda x, t: torch.cat([t[:, [1, 0]], t[:, 2:]], 1), 0, "CR*"
            ),
        },
    ),
    *cases(
        "order between blocks",
        {
            "reversed": lambda: between(reverse),
            "column-major": lambda: between(column_major(G)),
            "windowed": lambda: between(windows(G, (2, 3))),
            "shifted": lambda: between(shift(5)),
            "serpentine": lambda: between(on_grid(G, serpentine)),
            "shuffled": lambda: between(fixed()),
            "mirrored rows": lambda: between(mirror(G), 0, "*"),
            "sorted by score": lambda: between(by(lambda x: x[..., 0])),
            "sorted by norm": lambda: between(by(lambda x: x.norm(dim=-1)), 0, "*"),
            "sorted by the attention's output": lambda: Net(Stem(), Block(sort=by(lambda a: a[..., 0])), Block()),
            "reversed in the second block only": lambda: Net(Stem(), Block(), Around(Block(), reverse), Block()),
            "sorted in the second block only": lambda: Net(
                Stem(), Block(), Around(Block(), by(lambda x: x[..., 1])), Block()
            ),
            "column-major in the stem": lambda: vit(
                "C*", embed=nn.Sequential(conv(), Do(lambda x: x.mT.flatten(2).mT)), order=column_major(G)
            ),
        },
    ),
    *cases(
        "order between blocks", {"column-major, 4x4": lambda: between(column_major((4, 4)), grid=(4, 4))}, size=(32, 32)
    ),
    *cases(
        "order between blocks", {"windowed, 8x8": lambda: between(windows((8, 8), (4, 4)), grid=(8, 8))}, size=(64, 64)
    ),
    *cases(
        "second branch",
        {
            "reversed in the second": lambda: Both(vit(), Net(Stem(), Reorder(reverse), *blocks())),
            "sorted in the second": lambda: Both(vit(), between(by(lambda x: x[..., 0]))),
            "CLS last in the second": lambda: Both(vit(), vit("*C")),
            "mirrored view": lambda: Views(vit(), (lambda x: x, None, ""), (lambda x: x.flip(-1), mirror(G), "")),
            "zoomed view": lambda: Views(vit(), (lambda x: x, None, ""), (zoom, None, "a view of the middle")),
            "shifted view": lambda: Views(
                vit("*"), (lambda x: x.roll(8, -1), on_grid(G, lambda t: t.roll(1, 2)), ""), (lambda x: x, None, "")
            ),
        },
    ),
    *cases(
        "changing order",
        {
            k: functools.partial(lambda k: between(drawn(k), void=RANDOM), k)
            for k in ("torch", "torch, own generator", "numpy", "python", "alternating")
        },
    ),
    *cases(
        "order by image",
        {
            "rolled by content": lambda: between(rolled_by(lambda x: x[..., 0].argmax(1))),
            "reversed if bright": lambda: between(
                lambda x, t: torch.where((x.mean((1, 2)) > 0)[:, None, None], t.flip(1), t)
            ),
            "reversed by the first patch": lambda: between(
                lambda x, t: torch.where((x[:, 0, 1] > 0)[:, None, None], t.flip(1), t)
            ),
            "by index in the batch": lambda: between(rolled_by(lambda x: torch.arange(len(x)))),
        },
    ),
    *cases(
        "stem",
        {
            "BatchNorm": lambda: with_stem(conv(), nn.BatchNorm2d(DIM)),
            "two levels": lambda: with_stem(conv(4, 4), nn.GELU(), nn.Conv2d(DIM, DIM, 2, 2)),
            "space to depth": lambda: with_stem(nn.PixelUnshuffle(PATCH), nn.Conv2d(3 * PATCH**2, DIM, 1)),
            "unfold and linear": lambda: with_stem(
                nn.Unfold(PATCH, stride=PATCH), Do(lambda x: x.mT), nn.Linear(3 * PATCH**2, DIM)
            ),
        },
        must="all",
    ),
    *cases(
        "stem that blurs",
        {
            "GroupNorm": lambda: with_stem(conv(), nn.GroupNorm(4, DIM)),
            "InstanceNorm": lambda: with_stem(conv(), nn.InstanceNorm2d(DIM, affine=True), spec="*"),
            "squeeze-excitation": lambda: with_stem(conv(), SqueezeExcite()),
            "LayerNorm over all tokens": lambda: with_stem(conv(), Do(lambda x: F.layer_norm(x, x.shape[1:]))),
            "GroupNorm, then column-major": lambda: with_stem(
                conv(), nn.GroupNorm(1, DIM), Do(lambda x: x.mT.flatten(2).mT), order=column_major(G)
            ),
            "overlapping": lambda: with_stem(conv(12, 8, 2)),
            "overlapping, two levels": lambda: with_stem(
                conv(7, 4, 3), nn.GELU(), nn.Conv2d(DIM, DIM, 3, 2, 1), nn.BatchNorm2d(DIM)
            ),
            "convolutions between blocks": lambda: Net(Stem(), Block(), go.Convolve(), Block(), go.Convolve(), Block()),
            "GroupNorm, reversed between blocks": lambda: between(
                reverse, embed=nn.Sequential(conv(), nn.GroupNorm(4, DIM))
            ),
        },
    ),
    *cases(
        "stem that blurs",
        {"overlapping, as two disjoint ones": lambda: with_stem(TwoPhases(), grid=(2, 7))},
        size=(16, 32),
    ),
    *cases(
        "image changed inside",
        {
            "flipped": lambda: with_stem(Do(lambda x: x.flip(-2)), conv(), order=on_grid(G, lambda t: t.flip(1))),
            "enlarged": lambda: with_stem(Do(lambda x: F.interpolate(x, scale_factor=2)), conv(16, 16)),
        },
    ),
    *cases(
        "image changed inside",
        {
            "cropped": lambda: with_stem(Do(lambda x: x[..., 8:24, 8:40]), conv(), grid=(2, 4)),
            "each token a thinned image": lambda: with_stem(
                Do(
                    lambda x: (
                        x.unflatten(-2, (8, 4)).unflatten(-1, (8, 6)).permute(0, 3, 5, 1, 2, 4).flatten(3).flatten(1, 2)
                    )
                ),
                Do(lambda x: x.flatten(2)),
                nn.Linear(3 * PATCH**2, DIM),
                void="no token holds one part of the image",
            ),
        },
    ),
    *cases(
        "queries",
        {
            "in another order than keys": lambda: vit("C*", at.queries_in(fixed(), 1, True)),
            "in another order, results left there": lambda: vit("C*", at.queries_in(reverse, 1, False)),
            "one at a time": lambda: vit("C*", at.chunked(1), count=1),
            "in chunks with a remainder": lambda: vit("C*", at.chunked(7)),
            "rolled": lambda: vit("C*", at.rolled(q=1)),
        },
    ),
    *cases(
        "values and results",
        {
            "V rolled": lambda: vit("C*", at.rolled(v=1)),
            "result rolled": lambda: vit("C*", at.rolled(out=1)),
            "result mirrored": lambda: vit("*", at.rolled(flip=True)),
            "two hops": lambda: vit("C*", without_map(at.two_hops, "two hops")),
            "V from positions": lambda: vit("C*", at.from_positions),
            "dilated offsets folded into heads": lambda: vit("*", at.dilated(G, "heads")),
            "dilated offsets folded into the batch": lambda: vit("*", at.dilated(G, "batch")),
            "windows folded into heads": lambda: vit("*", at.windowed(G, (2, 3), "heads")),
            "images packed": lambda: vit("C*", without_map(at.packed, "all images in one sequence")),
        },
    ),
    *cases(
        "mixtures",
        {
            "sum of two attentions": lambda: vit("C*", without_map(at.summed, "two attentions of one V")),
            "difference of two attentions": lambda: vit(
                "C*", without_map(at.split_differently, "two attentions of one V")
            ),
            "differential matrix": lambda: vit("C*", at.differential),
            "gated with positions": lambda: vit("C*", at.gated),
        },
    ),
    *cases(
        "after the softmax",
        {
            "heads scaled and pruned": lambda: vit("C*", after(heads_scaled)),
            "masked": lambda: vit("C*", after(far_masked)),
            "identity added": lambda: vit("C*", after(lambda a: a + torch.eye(a.shape[-1], dtype=a.dtype))),
            "talking heads": lambda: vit("C*", after(talking)),
            "talking heads before it": lambda: vit("C*", instead(lambda s: talking(s).softmax(-1))),
            "top of it, renormalised": lambda: vit("C*", after(top)),
            "sigmoid instead": lambda: vit("C*", instead(sigmoid)),
            "a sink beside it": lambda: vit("C*", instead(with_sink)),
            "dropout that stays on": lambda: vit("C*", without_map(at.dropping, "random in each forward")),
        },
    ),
    *cases(
        "other tokens",
        {
            "learned latents": lambda: Net(Stem("*"), Block(), go.FromLatents(), Block()),
            "object queries with the patches": lambda: Net(Stem("*"), Block(), go.FromLatents(context=True), Block()),
            "text as keys": lambda: step(go.FromText()),
            "text before the patches": lambda: vit("R" * 24 + "*"),
            "slots": lambda: step(go.Slots()),
            "a learned pooling query": lambda: Net(Stem("*"), Block(), go.FromLatents(1, single=True)),
        },
    ),
    *cases(
        "other tokens",
        {"as many channels as tokens": lambda: vit("*", Attention(at.on_channels, heads=1), plain, grid=(4, 8))},
        size=(32, 64),
    ),
    *cases(
        "other tokens", {"efficient attention": lambda: vit("*", without_map(at.efficient, "channels attend"), plain)}
    ),
    *cases(
        "hierarchies",
        {
            "pooled keys": lambda: vit("*", go.Pooled(), go.Pooled()),
            "pooled keys and CLS": lambda: vit("C*", go.Pooled(keep=1), plain),
            "pooled queries": lambda: Net(Stem("*"), Block(), go.Pooled(q=True, kv=False), Block()),
            "merged by concatenation": lambda: step(go.Merge()),
            "merged by convolution, CLS kept": lambda: step(go.Merge(keep=1, conv=True), spec="C*"),
            "kept by score": lambda: step(go.Keep(12), spec="C*"),
            "random half": lambda: Net(Stem(), go.Keep(12, "random"), *blocks()),
            "similar tokens merged": lambda: step(go.MergeSimilar(), spec="C*"),
        },
    ),
    *cases(
        "blocks",
        {
            "LayerScale of 1e-5": lambda: Net(Stem(), *blocks(scale=1e-5)),
            "post-norm": lambda: Net(Stem(), *blocks(norm="post")),
            "ReZero": lambda: Net(Stem(), *blocks(scale=0.0)),
            "no residual": lambda: Net(Stem(), *blocks(residual=False)),
        },
        must="all",
    ),
    *cases(
        "blocks",
        {
            "LayerScale of 1e-5, reversed between": lambda: Net(
                Stem(), Block(scale=1e-5), Reorder(reverse), Block(scale=1e-5)
            ),
            "no residual, sorted between": lambda: Net(
                Stem("*"), Block(residual=False), Reorder(by(lambda x: x[..., 0]), 0), Block(residual=False)
            ),
        },
    ),
    *cases("images", {"one channel": lambda: vit("C*", embed=conv(channels=1))}, channels=1, must="all"),
    *cases("images", {"5x7": lambda: vit("CR*", grid=(5, 7))}, size=(40, 56), must="all"),
    *cases("images", {"one row": lambda: vit("C*", grid=(1, 8))}, size=(8, 64), patch=(0, 2)),
    *cases("images", {"a remainder": lambda: vit("C*")}, size=(36, 52)),
    *cases("images", {"float64": vit}, dtype=torch.float64, must="all"),
    *cases("images", {"bfloat16": vit}, dtype=torch.bfloat16, tolerance=2.0),
]


def lines(table: Iterable[Hostile]) -> Iterator[tuple[Hostile, Judgement]]:
    """Every judgement of these cases, one after another."""
    for case in table:
        for judgement in judge(case):
            yield case, judgement


def main(words: list[str]) -> None:
    """Print what became of the cases whose kind or name holds one of the words, or of all."""
    from tests.support.hostile_held_out import HELD_OUT

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, counts, kinds = time.perf_counter(), Counter(), {}
    wanted_right: Counter[str] = Counter()
    models: dict[str, bool] = {}  # whether all that was said of it may be said
    for held, table in (("", CASES), ("held out, ", HELD_OUT)):
        chosen = [c for c in table if not words or any(w in f"{held}{c.id} {c.name}" for w in words)]
        for case, found in lines(chosen):
            sort = found.verdict.partition(":")[0]
            counts[sort] += 1
            kinds.setdefault(held + case.kind, Counter())[sort] += 1
            wanted_right[sort] += found.wanted == "right"
            models[held + case.id] = models.get(held + case.id, True) and found.fine
            sign = " " if found.fine else "!"
            where = f"{found.layer or '-':24} {found.query!s:7}"
            print(f"{sign} {held}{case.kind}: {case.name:38} {where} {found.verdict:28} {found.reason[:90]}")
    print()
    for kind, count in kinds.items():
        print(f"{kind:36} " + ", ".join(f"{n} {sort}" for sort, n in sorted(count.items())))
    print(f"all: {dict(counts)}; of those that must be right: {dict(wanted_right)}")
    print(f"{sum(models.values())} of {len(models)} models without fault; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
