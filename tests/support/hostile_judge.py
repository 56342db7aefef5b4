"""A hostile model with float64 truth by place, and the verdict on what `record_attention` says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.layer_selection import QuerySpec
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.errors import AttentionError
from tests.support.hostile_tape import CLS, Grid, Truth, taped
from tests.support.zoo import enliven


@dataclass(frozen=True)
class Hostile:
    """A model. ``must``: "all", or the queries ("cls mean") that have to be right wherever there is a true map.

    Anything else may be refused; where no true map exists, it must be.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    must: str = ""
    size: Grid = (32, 48)
    channels: int = 3
    count: int = 2
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-3  # of uniform attention
    patch: Grid = (1, 2)  # asked as a query

    @property
    def queries(self) -> tuple[QuerySpec, ...]:
        """What is asked of each layer."""
        return ("cls", "mean", self.patch)

    @property
    def id(self) -> str:
        """Name in test output."""
        return f"{self.kind}-{self.name}".replace(" ", "_")

    def model(self) -> nn.Module:
        """The model in eval mode, the same every time."""
        torch.manual_seed(0)
        return enliven(self.build()).to(self.dtype).eval()

    def images(self) -> Tensor:
        """Noise images that are the same every time."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.count, self.channels, *self.size, generator=generator).to(self.dtype)

    def truths(self) -> dict[str, Truth]:
        """What every attention applied, by the name that its layer has: the module's path, with #n from its second."""
        model = self.model().double()
        names = {module: name for name, module in model.named_modules()}
        with torch.no_grad(), taped() as tape:
            model(self.images().double())
        seen: Counter[str] = Counter()
        truths = {}
        for truth in tape.truths:
            path = names[truth.module]
            truths[f"{path}#{seen[path]}" if seen[path] else path] = truth
            seen[path] += 1
        return truths


@dataclass(frozen=True)
class Expected:
    """The true answer to a query: maps (B, H, gh, gw), CLS's own part (B, H) if CLS is a key, and the other keys."""

    maps: Tensor
    cls: Tensor | None
    others: int


def expected(truth: Truth, query: QuerySpec) -> Expected | None:
    """The true answer, or None if there is none."""
    patches = truth.grid[0] * truth.grid[1]
    whole = [sorted(p for p in keys.tolist() if p >= 0) == list(range(patches)) for keys in truth.keys]
    if truth.void or truth.matrix is None or not all(whole):
        return None
    sizes = truth.queries.shape[1], truth.keys.shape[1]
    assert sizes == tuple(truth.matrix.shape[2:]), (sizes, truth.matrix.shape)
    if query == "mean":
        row = truth.matrix.mean(2)
    else:
        place = CLS if query == "cls" else query[0] * truth.query_grid[1] + query[1]
        which = truth.queries == place
        if not bool((which.sum(1) == 1).all()):
            return None
        row = torch.stack([m[:, w].squeeze(1) for m, w in zip(truth.matrix, which, strict=True)])
    order = truth.keys.masked_fill(truth.keys < 0, patches).argsort(dim=1, stable=True)[:, :patches]
    maps = row.gather(2, order[:, None].expand(-1, row.shape[1], -1)).unflatten(-1, truth.grid)
    cls = truth.keys == CLS
    alone = bool((cls.sum(1) == 1).all())
    own = torch.stack([r[:, c].squeeze(-1) for r, c in zip(row, cls, strict=True)]) if alone else None
    return Expected(maps, own, truth.keys.shape[1] - patches)


def compare(got: LayerAttention, truth: Expected | None, query: QuerySpec, tolerance: float) -> str:
    """The verdict on a map that was accepted."""
    if truth is None:
        return "wrong: there is no true map"
    if got.grid != tuple(truth.maps.shape[-2:]) or got.maps.shape != truth.maps.shape:
        return f"wrong: {tuple(got.maps.shape)} for {tuple(truth.maps.shape)}"
    if got.num_prefix != truth.others:
        return f"wrong: {got.num_prefix} tokens before the patches, not {truth.others}"
    differences = [got.maps.double() - truth.maps]
    if query == "cls" and truth.cls is not None:
        differences.append(got.rows[..., 0].double() - truth.cls)
    far = max(float(d.abs().amax()) for d in differences) * got.rows.shape[-1]
    return "right" if far <= tolerance else f"wrong: {far:.2g}"


@dataclass(frozen=True)
class Judgement:
    """What became of one query at one layer. ``wanted``: "right", "right or refused", or "refused"."""

    layer: str
    query: QuerySpec
    verdict: str  # right, refused, wrong: how far, crashed: with what
    wanted: str
    reason: str = ""

    @property
    def fine(self) -> bool:
        """Whether this may happen."""
        return self.verdict in self.wanted.split(" or ")


def judge(case: Hostile) -> list[Judgement]:
    """Every query at every layer (of more than six, at some), each recorded alone."""
    truths = case.truths()
    model, images = case.model(), case.images()
    try:
        names = [site.name for site in AttentionRecorder(model).sites(images)]
        reason = "no attention was found there"
    except AttentionError as error:
        names, reason = [], str(error)
    except Exception as error:  # a crash is a verdict too
        return [Judgement("", query, f"crashed: {error!r}", "refused") for query in case.queries]
    asked = range(len(names)) if len(names) <= 6 else (0, 1, len(names) // 2, len(names) - 2, len(names) - 1)
    judgements = [_judge(case, model, images, truths, i, names[i], query) for i in asked for query in case.queries]
    unseen = [name for name in truths if name not in names]
    missing = [(n, q, _wanted(case, expected(truths[n], q), q)) for n in unseen for q in case.queries]
    return judgements + [Judgement(n, q, "refused", wanted, reason) for n, q, wanted in missing]


def _wanted(case: Hostile, truth: Expected | None, query: QuerySpec) -> str:
    if truth is None:
        return "refused"
    word = query if isinstance(query, str) else "patch"
    return "right" if case.must == "all" or word in case.must.split() else "right or refused"


def _judge(
    case: Hostile, model: nn.Module, images: Tensor, truths: dict[str, Truth], index: int, name: str, query: QuerySpec
) -> Judgement:
    known = truths.get(name)
    if known is None and (first := truths.get(name.partition("#")[0])) is not None and first.void:
        known = first
    truth = None if known is None else expected(known, query)
    wanted, reason = _wanted(case, truth, query), ""
    try:
        (got,) = record_attention(model, images, layers=index, query=query)
        verdict = compare(got, truth, query, case.tolerance)
    except AttentionError as error:
        verdict, reason = "refused", str(error)
    except Exception as error:  # a crash is a verdict too
        verdict = f"crashed: {error!r}"
    return Judgement(name, query, verdict, wanted, reason)
