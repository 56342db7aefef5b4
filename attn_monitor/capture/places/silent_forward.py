"""A forward pass in which attention mixes no tokens, so that each token can be read at every depth.

Every attention product returns its own query (or nothing, or marks) in place of what attention would have given: then a
token holds the same part of the image in the last layer as in the first, unless the model itself moves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture import operations as ops
from attn_monitor.capture.error_origin import errors_from
from attn_monitor.capture.observer import AttentionObserver, SiteKey, run_operation
from attn_monitor.capture.places.layout import SKETCH
from attn_monitor.capture.rows import Folding, Reading, widen

Call = tuple[str, int]
"""A module's path, and which of its calls within one forward."""


@dataclass
class HowToRead:
    """How the tensors of one site are to be read. ``knows_query``: its scores are products of queries and keys."""

    folding: Folding | None
    reading: Reading | None
    knows_query: bool | None = None


@dataclass
class SiteTokens:
    """Sketches of the tokens at one attention operation: (B, T, S), and those of V by head, (B, H, K, S)."""

    v: Tensor
    heads: Tensor | None
    q: Tensor | None
    k: Tensor | None
    queries: int
    dtype: torch.dtype
    within: tuple[Call, ...]  # calls of the modules around, the outermost first


@dataclass
class Tokens:
    """What was read in silent forwards: at attention operations, and where modules begin and end."""

    sites: dict[SiteKey, SiteTokens] = field(default_factory=dict)
    entries: dict[Call, Tensor] = field(default_factory=dict)  # (B, T, S)
    exits: dict[Call, Tensor] = field(default_factory=dict)
    again: dict[SiteKey, Tensor] = field(default_factory=dict)  # what the same weights met in a further product
    mixed: set[SiteKey] = field(default_factory=set)  # sites whose V is in another product that is no attention


class SilentObserver(AttentionObserver):
    """Silences attention and keeps sketches of the tokens of the sites that ``how`` says how to read.

    ``marks`` (B, Q) bool for a site: then results are nothing but strong noise at the marked queries. ``nudged`` are
    (module, name) of parameters that the model sees changed. Of sites with less than ``by_head`` keys, V of each head
    is kept too.
    """

    def __init__(
        self,
        images: Tensor,
        how: Mapping[SiteKey, HowToRead],
        *,
        marks: Mapping[SiteKey, Tensor] | None = None,
        nudged: Sequence[tuple[nn.Module, str]] = (),
        by_head: int = 0,
    ) -> None:
        super().__init__(lambda *_: None, lambda _: None, images=images, verify=False)
        self.how, self.marks, self.nudged, self.by_head = how, marks, nudged, by_head
        self.tokens = Tokens()
        self._factors: list[tuple[Tensor, Tensor, Tensor]] = []  # of the last few products
        self._scores_of: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]] = {}
        self._spent: list[tuple[Tensor, SiteKey]] = []  # weights that have met a V: another product may use them
        self._values: list[tuple[Tensor, SiteKey]] = []  # the last few V
        self._calls: dict[str, int] = {}
        self._open: list[Call] = []

    def watch_calls(self, stack: ExitStack, modules: Mapping[str, nn.Module], paths: set[str]) -> None:
        """Also read the tokens with which the modules at these paths are called, and what they return."""
        for path in paths:
            if isinstance(modules[path], torch.jit.ScriptModule):
                continue
            stack.enter_context(modules[path].register_forward_pre_hook(self._begin(path), with_kwargs=True))
            stack.enter_context(modules[path].register_forward_hook(self._end(path)))

    def _begin(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = (path, self._calls.get(path, 0))
            self._calls[path] = call[1] + 1
            self._open.append(call)
            self._keep(self.tokens.entries, call, (args, kwargs))

        return hook

    def _end(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._open and self._open[-1][0] == path:
                self._keep(self.tokens.exits, self._open.pop(), out)

        return hook

    def _keep(self, kept: dict[Call, Tensor], call: Call, values: Any) -> None:
        for x in _tensors(values):
            if x.ndim == 3 and x.is_floating_point() and self.batch in x.shape[:2]:
                x = x if x.shape[0] == self.batch else x.transpose(0, 1)
                kept[call] = sketch(x[:, None])
                return

    @errors_from("monitor")
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.nudged:
            args = tuple(self._nudge(a) for a in args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _nudge(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._nudge(a) for a in argument)
        if isinstance(argument, Tensor):
            for module, name in self.nudged:
                now = module._parameters[name]  # under FSDP another tensor than before the forward
                if now is not None and ops.is_same(argument, now):
                    return argument + _noise(argument.shape, argument) * (widen(now).std(correction=0) + 0.5)
        return argument

    def _fused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, call, out = self._key(), ops.fused_call(func, args, kwargs), run_operation(func, args, kwargs)
        self._silence(key, _Product(_result(out), call.q.shape[:-1], call.q, call.k, call.v))
        return out

    def _unknown(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls = ops.unknown_calls(func, args, kwargs, out)
        if calls:
            key = self._key()
            call = ops.reading_of(calls, self.how[key].reading if key in self.how else None)
            self._silence(key, _Product(_result(out), call.q.shape[:-1], call.q, call.k, call.v, call.heads_first))

    def _weights(self, args: tuple[Any, ...], out: Tensor) -> None:
        super()._weights(args, out)
        fitting = [f for f in self._factors if f[2].numel() == out.numel() and f[2].shape[-2:] == out.shape[-2:]]
        waiting = {id(weights) for weights, _ in self._pending}
        self._scores_of = {i: s for i, s in self._scores_of.items() if i in waiting}
        self._scores_of[id(out)] = (args[0], fitting[-1:])

    def _product(self, args: tuple[Any, ...], out: Tensor) -> None:
        seen = dict(self._count)
        super()._product(args, out)
        if seen == self._count:
            self._used_again(args, out)
        self._factors = [*self._factors[-3:], (args[0], args[1], out)]

    def _used_again(self, args: tuple[Any, ...], out: Tensor) -> None:
        """Silence also a further product of weights that have met their V, or of a V that weights have met."""
        for left, right in (args, (args[1].mT, args[0].mT)):
            for weights, key in self._spent:
                if ops.is_same(left, weights) and key in self.how:
                    values = _group(right, self.batch, self.how[key].folding)
                    if values is not None:
                        self.tokens.again[key] = sketch(values)
                    out.zero_()
                    return
            for values, key in self._values:
                if ops.is_same(right, values):
                    self.tokens.mixed.add(key)
                    out.zero_()
                    return

    def _explicit(self, args: tuple[Any, ...], out: Tensor) -> None:
        taken = self._take_weights(args)
        if taken is None:
            return
        call, key = taken[0], self._key()
        self._spent = [*self._spent, *((weights, key) for weights in call.weights), (call.applied, key)][-32:]
        made = [self._scores_of[id(w)] for w in reversed(call.weights)]
        scores, factors = next(((s, f[0]) for s, f in made if f), (made[0][0], None))
        q = k = None
        if factors is not None and self._are_products(key, scores, factors[2]):
            q, k = factors[0], factors[1].mT
        result = out.mT if call.swapped else out
        self._silence(key, _Product(result, result.shape[:-1], q, k, call.values))

    def _are_products(self, key: SiteKey, scores: Tensor, product: Tensor) -> bool:
        """Whether scores are the products, up to a mix of heads and what is the same for all images."""
        how = self.how.get(key)
        if how is None:
            return True
        if how.knows_query is None:
            s, p = (_group(t, self.batch, how.folding) for t in (scores, product))
            how.knows_query = s is not None and p is not None and self.batch > 1 and _explains(p, s)
        return how.knows_query

    def _silence(self, key: SiteKey, product: _Product) -> None:
        """Replace the result, and keep sketches of what came in."""
        how, out = self.how.get(key), product.out
        self._count[key[0]] = key[1] + 1
        if any(ops.is_same(right, product.v) or ops.is_same(left, product.v) for left, right, _ in self._factors):
            self.tokens.mixed.add(key)
        self._values = [*self._values[-7:], (product.v, key)]
        if how is not None:
            self._read(key, how, product)
        content = None
        if self.marks is None:
            content = product.query_as_result()
        elif key in self.marks and how is not None and key in self.tokens.sites:
            content = _marked(self.marks[key], how.folding, product)
        if content is None:
            out.zero_()
        else:
            out.copy_((content if product.heads_first else content.transpose(1, 2)).reshape(out.shape))

    def _read(self, key: SiteKey, how: HowToRead, product: _Product) -> None:
        v, q, k = (None if t is None else _group(t, self.batch, how.folding) for t in (product.v, product.q, product.k))
        if v is not None:
            self.tokens.sites[key] = SiteTokens(
                v=sketch(v),
                heads=_project(v) if v.shape[2] < self.by_head else None,
                q=None if q is None else sketch(q),
                k=None if k is None else sketch(k),
                queries=product.lead[-1],
                dtype=v.dtype,
                within=tuple(self._open),
            )


@dataclass
class _Product:
    """An attention product: its result, to be overwritten, and its inputs. ``lead`` is (…, Q) of the queries."""

    out: Tensor
    lead: torch.Size
    q: Tensor | None
    k: Tensor | None
    v: Tensor
    heads_first: bool = True

    @property
    def width(self) -> int:
        """Channels of one query's result."""
        return self.out.numel() // math.prod(self.lead)

    def query_as_result(self) -> Tensor | None:
        """Each query in the place of its own result; None where it is not known."""
        if self.q is None or self.q.shape[:-1] != self.lead:
            return None
        # As it is where it fits: of channel attention, a projection would mix tokens.
        same = self.q.shape[-1] == self.width
        return self.q if same else self.q @ _matrix(self.q.shape[-1], self.width, self.q)


def _marked(marks: Tensor, folding: Folding | None, product: _Product) -> Tensor | None:
    """Strong noise as results of the (B, Q) marked queries, and nothing for the others."""
    (*lead, queries), batch = product.lead, len(marks)
    heads = math.prod(lead) // batch
    if marks.shape[1] != queries or heads * batch != math.prod(lead):
        return None
    strength = (1e2 if product.out.dtype == torch.float16 else 1e4) * float(product.v.float().std().clamp_min(1e-3))
    noise = _noise((heads, queries, product.width), product.out) * strength
    content = noise * marks[:, None, :, None].to(noise)  # (B, H, Q, D)
    marked: Tensor = content if folding != "heads first" else content.transpose(0, 1)
    return marked.reshape(*product.lead, product.width)


def _result(out: Any) -> Tensor:
    tensor = ops.first_tensor(out)
    assert tensor is not None  # attention gives one
    return tensor


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _group(x: Tensor, images: int, folding: Folding | None) -> Tensor | None:
    """(B, H, T, D) of (L, T, D) or (B, H, T, D); None where it is not of this many images."""
    x = x.reshape(-1, *x.shape[-2:])
    if len(x) % images:
        return None
    grouped: Tensor = x.unflatten(0, (-1, images) if folding == "heads first" else (images, -1))
    return grouped.transpose(0, 1) if folding == "heads first" else grouped


def _noise(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(7)).to(like)


def _matrix(rows: int, cols: int, like: Tensor) -> Tensor:
    return _noise((rows, cols), like) / math.sqrt(rows)


def _project(x: Tensor) -> Tensor:
    """(..., D) to (..., S) float32, which keeps distances and proportions."""
    return x.float() @ _matrix(x.shape[-1], SKETCH, x.float())


def sketch(x: Tensor) -> Tensor:
    """(B, T, S) of (B, H, T, D)."""
    return _project(x.transpose(1, 2).flatten(2))


def _explains(products: Tensor, scores: Tensor) -> bool:
    """Whether what differs between two images' scores is what differs between their products, with heads mixed.

    Both are (B, H, Q, K). Some of it may come on top, such as a bias that is computed from the queries.
    """
    step = max(1, scores.shape[2] // 64)
    finite = (scores[1].isfinite() & scores[0].isfinite())[:, ::step]
    score = torch.where(finite, widen(scores[1] - scores[0])[:, ::step], 0).flatten(1).double()
    difference = widen(products[1] - products[0])
    for product in (difference, difference.mT) if products.shape[-1] == products.shape[-2] else (difference,):
        p = torch.where(finite, product[:, ::step], 0).flatten(1).double()
        mix = score @ p.T @ torch.linalg.pinv(p @ p.T)
        if float((score - mix @ p).norm()) <= 0.7 * float(score.norm()):
            return True
    return False
