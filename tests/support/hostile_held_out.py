"""Hostile models that no threshold was ever tuned on: other compositions of the same parts."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import hostile_attention as at
from tests.support import hostile_steps as go
from tests.support.hostile import RANDOM, G, between, cases, step, vit, with_stem
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
    static,
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
    Views,
    after,
    blocks,
    conv,
    fused,
    instead,
    matrix_of,
    without_map,
)
from tests.support.hostile_tape import register
from tests.support.styles import DIM, PATCH


def diagonal(t: Tensor) -> Tensor:
    """(B, 24, C) by diagonals of the grid."""
    return t[:, sorted(range(24), key=lambda i: (i // 6 + i % 6, i))]


def renormalised(a: Tensor) -> Tensor:
    """The diagonal is left out, and rows sum to 1 again."""
    a = a * (1 - torch.eye(a.shape[-1], dtype=a.dtype))
    return a / a.sum(-1, keepdim=True)


def relu(s: Tensor) -> Tensor:
    """Half of the scores count, divided by their number."""
    return s.relu() / s.shape[-1]


def middle_as_whole(x: Tensor) -> Tensor:
    """The image without its border, enlarged to its size."""
    return F.interpolate(x[..., 4:-4, 6:-6], size=x.shape[-2:], mode="bilinear")


def tripled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A·A·V."""
    a = matrix_of(q, k)
    return a @ (a @ v)


HELD_OUT = [
    *cases(
        "coding",
        {
            "columns of V": lambda: vit("RC*", at.values_on_the_left),
            "sequence first, registers first": lambda: vit("RRC*", at.Multihead(batch_first=False), at.SequenceFirst()),
        },
        must="all",
    ),
    *cases(
        "coding with B equal to H",
        {
            "H, B; CLS last": lambda: vit("*C", at.heads_outside),
            "HB and BH": lambda: vit("C*", at.heads_first, at.folded),
        },
        count=4,
    ),
    *cases(
        "prefix",
        {
            "CLS between two registers, after the patches": lambda: vit("R*CR"),
            "CLS and registers in the middle": lambda: vit("<RCR>", fused),
        },
        must="all",
    ),
    *cases("prefix without one CLS", {"class tokens beside a register": lambda: vit("CRC*")}, must="mean patch"),
    *cases(
        "prefix hard to know",
        {
            "an image's register before CLS": lambda: vit("GC*"),
            "last token named token": lambda: vit("*T"),
            "prompts at the end of the second block": lambda: step(go.Insert("*RR", register, "prompts"), spec="C*"),
        },
    ),
    *cases(
        "CLS moves",
        {
            "seven tokens on, with registers": lambda: between(shift(7), 0, "CRR*"),
            "from last to first": lambda: between(shift(1), 0, "*C"),
        },
    ),
    *cases(
        "order between blocks",
        {
            "2x2 by 2x2": lambda: between(windows(G, (2, 2))),
            "even tokens first": lambda: between(static(lambda t: torch.cat([t[:, ::2], t[:, 1::2]], 1)), 0, "*"),
            "diagonals": lambda: between(static(diagonal)),
            "shifted windows": lambda: between(on_grid(G, lambda t: t.roll((1, 2), (1, 2)))),
            "mirrored, then as before": lambda: Net(
                Stem(), Block(), Reorder(mirror(G)), Block(), Reorder(mirror(G)), Block()
            ),
            "sorted twice": lambda: Net(
                Stem(), *(m for i in range(2) for m in (Block(), Reorder(by(lambda x, i=i: x[..., i])))), Block()
            ),
            "sorted by the output's norm": lambda: Net(
                Stem("*"), Block(fused, sort=by(lambda a: a.norm(dim=-1)), keep=0), Block(fused)
            ),
            "windowed in the second block only": lambda: Net(
                Stem(), Block(fused), Around(Block(fused), windows(G, (2, 3))), Block(fused)
            ),
            "shuffled in the stem": lambda: vit(
                "C*",
                embed=nn.Sequential(conv(), Do(lambda x: fixed(8)(x, x.flatten(2).mT))),
                order=fixed(8),
            ),
        },
    ),
    *cases(
        "order between blocks",
        {"rows changed about, 5x7": lambda: between(on_grid((5, 7), lambda t: t[:, [1, 0, 3, 2, 4]]), grid=(5, 7))},
        size=(40, 56),
    ),
    *cases(
        "second branch",
        {
            "three orders": lambda: Both(vit(), between(column_major(G)), between(shift(3))),
            "registers before CLS in the second": lambda: Both(vit("CRR*"), vit("RRC*")),
            "turned view": lambda: Views(vit(), (lambda x: x, None, ""), (lambda x: x.flip((-1, -2)), reverse, "")),
            "corner, enlarged": lambda: Views(
                vit(),
                (lambda x: F.interpolate(x[..., :16, :24], scale_factor=2), None, "a view of a corner"),
                (lambda x: x, None, ""),
            ),
            "two views in one batch": lambda: with_stem(
                Do(lambda x: torch.cat([x, x.flip(-1)])), conv(), void="two views in one batch"
            ),
        },
    ),
    *cases(
        "second branch",
        {
            "transposed view": lambda: Views(
                vit(grid=(4, 4)), (lambda x: x, None, ""), (lambda x: x.mT, column_major((4, 4)), "")
            )
        },
        size=(32, 32),
    ),
    *cases(
        "changing order",
        {
            k: functools.partial(lambda k: between(drawn(k), void=RANDOM), k)
            for k in ("torch, roll", "numpy, own generator", "python, own generator", "turning")
        },
    ),
    *cases(
        "order by image",
        {
            "rolled to the largest token": lambda: between(rolled_by(lambda x: x.norm(dim=-1).argmax(1)), 0, "*"),
            "mirrored by a patch": lambda: between(
                lambda x, t: torch.where((x[:, 3, 1] > 0)[:, None, None], mirror(G)(x, t), t)
            ),
            "each second image reversed": lambda: between(
                lambda x, t: torch.where((torch.arange(len(x)) % 2 == 1)[:, None, None], t.flip(1), t)
            ),
        },
    ),
    *cases(
        "stem",
        {
            "two levels and norms": lambda: with_stem(
                conv(2, 2), nn.BatchNorm2d(DIM), nn.GELU(), nn.Conv2d(DIM, DIM, 4, 4), nn.BatchNorm2d(DIM)
            )
        },
        must="all",
    ),
    *cases(
        "stem that blurs",
        {
            "GroupNorm, column-major between blocks": lambda: between(
                column_major(G), embed=nn.Sequential(conv(), nn.GroupNorm(1, DIM))
            ),
            "squeeze-excitation, sorted": lambda: between(
                by(lambda x: x[..., 0]), embed=nn.Sequential(conv(), SqueezeExcite())
            ),
            "InstanceNorm, shifted": lambda: between(
                shift(4), 0, "*", embed=nn.Sequential(conv(), nn.InstanceNorm2d(DIM, affine=True))
            ),
            "three strided convolutions": lambda: with_stem(
                conv(3, 2, 1),
                nn.BatchNorm2d(DIM),
                nn.ReLU(),
                nn.Conv2d(DIM, DIM, 3, 2, 1),
                nn.BatchNorm2d(DIM),
                nn.ReLU(),
                nn.Conv2d(DIM, DIM, 3, 2, 1),
            ),
            "overlapping, mirrored between blocks": lambda: between(mirror(G), embed=conv(10, 8, 1)),
            "convolution, then reversed": lambda: Net(Stem(), Block(), go.Convolve(), Reorder(reverse), Block()),
        },
    ),
    *cases(
        "image changed inside",
        {
            "turned": lambda: with_stem(Do(lambda x: x.flip((-1, -2))), conv(), order=reverse),
            "rolled": lambda: with_stem(Do(lambda x: x.roll(16, -1)), conv(), order=on_grid(G, lambda t: t.roll(2, 2))),
            "enlarged smoothly": lambda: with_stem(
                Do(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), conv(16, 16)
            ),
            "border cut off, enlarged": lambda: with_stem(Do(middle_as_whole), conv(), void="the border is cut off"),
            "pixels in the order of memory": lambda: with_stem(
                Do(lambda x: x.flatten(1).roll(100, 1).reshape(len(x), 24, -1)),
                nn.Linear(3 * PATCH**2, DIM),
                void="tokens are no patches",
            ),
        },
    ),
    *cases(
        "queries",
        {
            "mirrored, put back": lambda: vit("*", at.queries_in(mirror(G), 0, True)),
            "shifted, left there": lambda: vit("*", at.queries_in(shift(3), 0, False)),
            "fused, in chunks": lambda: vit("C*", at.chunked(10, fused)),
            "two at a time, CLS last": lambda: vit("*C", at.chunked(2), count=1),
            "rolled far": lambda: vit("*", at.rolled(q=11)),
        },
    ),
    *cases(
        "values and results",
        {
            "V rolled far": lambda: vit("*", at.rolled(v=-7)),
            "result and V rolled": lambda: vit("C*", at.rolled(v=2, out=2)),
            "Q and V rolled, result rolled back": lambda: vit("C*", at.rolled(q=1, v=1, out=-1)),
            "the same matrix twice": lambda: vit("C*", without_map(tripled, "two hops")),
            "V is the mean": lambda: vit("C*", at.from_means),
            "V of the next image": lambda: vit("C*", at.from_next_image),
            "windows folded into the batch": lambda: vit("*", at.windowed(G, (2, 2), "batch")),
            "dilated in the second block": lambda: vit("*", fused, at.dilated(G, "heads")),
        },
    ),
    *cases(
        "after the softmax",
        {
            "without the diagonal": lambda: vit("C*", after(renormalised)),
            "squared": lambda: vit("*", after(lambda a: a.square())),
            "half of it, half uniform": lambda: vit("C*", after(lambda a: a / 2 + 0.5 / a.shape[-1])),
            "minus its mean": lambda: vit("C*", after(lambda a: a - a.mean(-1, keepdim=True))),
            "ReLU instead": lambda: vit("C*", instead(relu)),
            "softmax over queries": lambda: vit("*", at.over_queries_alone),
            "slots' softmax": lambda: vit("*", at.over_queries),
        },
    ),
    *cases(
        "other tokens",
        {
            "latents twice": lambda: Net(Stem("*"), go.FromLatents(), go.FromLatents(), Block()),
            "text after the patches": lambda: vit("*" + "R" * 24, fused),
            "fewer slots": lambda: step(go.Slots(12)),
            "text after a new order": lambda: step(Reorder(reverse, 0), go.FromText()),
            "class attention after a new order": lambda: Net(
                Stem("*"), Block(), Reorder(reverse, 0), go.Insert("C*"), go.ClassAttention(), go.ClassAttention()
            ),
        },
    ),
    *cases(
        "other tokens",
        {
            "as many channels as tokens, two heads": lambda: vit(
                "*", Attention(at.on_channels, heads=2), fused, grid=(4, 4)
            )
        },
        size=(32, 32),
    ),
    *cases(
        "hierarchies",
        {
            "keys pooled by convolution": lambda: step(Block(go.Pooled(conv=True))),
            "queries and keys pooled": lambda: Net(Stem("*"), Block(), go.Pooled(q=True, kv=True), Block()),
            "every second token": lambda: step(go.Keep(12, "fixed"), spec="C*"),
            "all merged in pairs": lambda: step(go.MergeSimilar(12), spec="C*"),
            "merged, then mirrored": lambda: step(go.Merge(), Reorder(mirror((2, 3)), 0)),
        },
    ),
    *cases(
        "hierarchies",
        {
            "merged twice": lambda: Net(
                Stem("*", grid=(8, 8)), Block(), go.Merge((8, 8)), Block(), go.Merge((4, 4), conv=True), Block()
            )
        },
        size=(64, 64),
    ),
    *cases(
        "blocks",
        {
            "post-norm, no residual": lambda: Net(Stem(), *blocks(norm="post", residual=False)),
            "ReZero, column-major between": lambda: Net(
                Stem(), Block(scale=0.0), Reorder(column_major(G)), Block(scale=0.0)
            ),
            "LayerScale of 1e-5, sorted between": lambda: Net(
                Stem("RC*"), Block(scale=1e-5), Reorder(by(lambda x: x[..., 2]), 2), Block(scale=1e-5)
            ),
        },
    ),
    *cases("images", {"one channel, reversed": lambda: between(reverse, embed=conv(channels=1))}, channels=1),
    *cases("images", {"one column": lambda: vit("*", grid=(8, 1))}, size=(64, 8), patch=(2, 0)),
    *cases("images", {"3x5, shuffled": lambda: between(fixed(), 0, "*", grid=(3, 5))}, size=(24, 40)),
    *cases("images", {"float64, sorted": lambda: between(by(lambda x: x[..., 0]))}, dtype=torch.float64),
    *cases("images", {"bfloat16, reversed": lambda: between(reverse)}, dtype=torch.bfloat16, tolerance=2.0),
]
