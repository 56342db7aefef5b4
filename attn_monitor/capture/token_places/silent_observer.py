"""Ablate attention in a forward, so that it mixes no tokens and each token can be read at every depth.

Every attention product returns its own query (or zeros, or marks) instead of its result. Then a token depends on the
same part of the image in the last layer as in the first, unless the model itself moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map

from attn_monitor.capture import operations as ops
from attn_monitor.capture.attention_rows import FusedCall, Memory, Weights, widen
from attn_monitor.capture.error_origin import errors_from
from attn_monitor.capture.observation import SiteKey
from attn_monitor.capture.observer import AttentionObserver, run_operation
from attn_monitor.capture.token_places.attention_product import (
    AttentionProduct,
    by_image_and_head,
    some_queries,
)
from attn_monitor.capture.token_places.random_projections import (
    coarsest,
    noise_like,
    off_device,
    precision_of,
    project,
    sketch,
)
from attn_monitor.capture.token_places.token_parameters import ParameterUses, TokenParameter
from attn_monitor.capture.token_places.tokens import Call, SiteFormat, SiteTokens, Tokens
from attn_monitor.capture.unknown_operations import call_by


@dataclass(eq=False)
class _Factors:
    """Hold the operands of a product that may become scores, and samples of its (..., Q, K) result.

    Attributes:
        q: The left operand, (..., Q, D).
        k: The right operand, transposed to (..., K, D).
        count: Number of elements of the result.
        shape: (Q, K).
        samples: Some rows of the result and, where Q = K, of its transpose.
        used: Whether an attention used it; then it is dropped at the next product, to free memory.
    """

    q: Tensor
    k: Tensor
    count: int
    shape: torch.Size
    samples: list[Tensor]
    used: bool = False

    def may_become(self, weights: Tensor) -> bool:
        """Check that the result fits the shape of ``weights``, up to heads among its queries or missing columns."""
        (queries, keys), rows = self.shape, weights.numel() // weights.shape[-1]
        same_rows = self.count == rows * keys and queries % weights.shape[-2] == 0
        return same_rows and weights.shape[-1] >= keys

    def laid_out(self, scores: Tensor) -> list[Tensor]:
        """Reshape scores to (L, Q, K) like the result; with more columns, return their first K and their last K."""
        (queries, keys), more = self.shape, scores.shape[-1] > self.shape[1]
        ends = [scores[..., :keys], scores[..., -keys:]] if more else [scores]
        return [end.reshape(-1, queries, keys) for end in ends]


class SilentObserver(AttentionObserver):
    """Ablate attention and keep sketches of the tokens.

    Args:
        images: (B, C, H, W), the input of the forward.
        formats: Layout of the tokens at each site to read.
        marks: For each site (B, Q) bool: results are strong noise at the marked queries and zero elsewhere. Without
            marks (None), results are the queries.
        nudged: Parameters to which the model's operations see noise added.
        uses: Records how the model uses its small parameters.
        by_head: Sites with fewer keys than this have V of each head kept too.
        exchanged: For each call (B, T) bool: the call receives noise as its tokens, the same in every image except at
            the exchanged tokens.
    """

    def __init__(
        self,
        images: Tensor,
        formats: Mapping[SiteKey, SiteFormat],
        *,
        marks: Mapping[SiteKey, Tensor] | None = None,
        nudged: Sequence[TokenParameter] = (),
        uses: ParameterUses | None = None,
        by_head: int = 0,
        exchanged: Mapping[Call, Tensor] | None = None,
    ) -> None:
        super().__init__(lambda *_: None, lambda _: None, images=images, verify=False)
        self.formats, self.marks, self.nudged, self.uses, self.by_head = formats, marks, nudged, uses, by_head
        self.exchanged = exchanged or {}
        self.tokens = Tokens()
        self._factors: list[_Factors] = []  # the last few products that are no attention
        self._operands: list[Memory] = []  # their operands
        self._made_of: dict[Weights, tuple[list[Tensor], _Factors | None]] = {}  # some rows of the scores; q and k
        self._spent: list[tuple[Memory, SiteKey]] = []  # used weights, which another product may use
        self._cut: list[tuple[Memory, SiteKey]] = []  # weights used without some of their keys or heads
        self._values: list[tuple[Memory, SiteKey]] = []  # the last few V
        self._calls: dict[str, int] = {}
        self._open: list[Call] = []
        self._precision = torch.float64

    def watch_calls(self, stack: ExitStack, modules: Mapping[str, nn.Module], paths: set[str]) -> None:
        """Hook the modules at these paths until ``stack`` closes, to read the tokens that they receive and return."""
        for path in paths:
            if isinstance(modules[path], torch.jit.ScriptModule):
                continue
            stack.enter_context(modules[path].register_forward_pre_hook(self._begin(path), with_kwargs=True))
            stack.enter_context(modules[path].register_forward_hook(self._end(path)))

    def _begin(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = (path, self._calls.get(path, 0))
            self._calls[path] = call[1] + 1
            self._open.append(call)
            if (exchanged := self.exchanged.get(call)) is not None:
                return tree_map(lambda x: self._noise(x, exchanged), (args, kwargs))
            if (entering := next(self._sketches((args, kwargs)), None)) is not None:
                self.tokens.entries[call] = entering
            return None

        return hook

    def _noise(self, x: Any, exchanged: Tensor) -> Any:
        """Return noise if the argument could be T tokens, with ``exchanged`` (B, T) bool, else the argument itself."""
        if not self._could_be_tokens(x):
            return x
        batch_first = x.shape[0] == self.batch
        _, tokens, channels = x.shape if batch_first else x.transpose(0, 1).shape
        if tokens != exchanged.shape[1]:
            return x
        kept, others = noise_like((2, tokens, channels), x)
        noise = torch.where(exchanged[..., None].to(x.device), 4 * others, kept)
        return noise if batch_first else noise.transpose(0, 1)

    def _end(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._open and self._open[-1][0] == path:
                self.tokens.exits[self._open.pop()] = tuple(self._sketches(out))

        return hook

    def _sketches(self, values: Any) -> Iterator[Tensor]:
        """Sketch what could be tokens among a module's arguments or results, as (B, T, S)."""
        for x in _tensors(values):
            if self._could_be_tokens(x):
                yield off_device(sketch((x if x.shape[0] == self.batch else x.transpose(0, 1))[:, None]))

    def _could_be_tokens(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or is_functorch_wrapped_tensor(x):  # a tensor inside vmap cannot be projected
            return False
        return not x.is_nested and x.ndim == 3 and x.is_floating_point() and self.batch in x.shape[:2]

    @errors_from("monitor")
    def _dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.uses is not None:
            self.uses.note(func, args)
        if self.nudged:
            args = tuple(self._nudge(a) for a in args)
        return super()._dispatched(func, args, kwargs)

    def _nudge(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._nudge(a) for a in argument)
        if isinstance(argument, Tensor):
            for parameter in self.nudged:
                now = parameter.tensor
                if now is not None and ops.is_same(argument, now):
                    with torch.inference_mode(False):  # the model may take views of it, as of a parameter
                        return argument + noise_like(argument.shape, argument) * (widen(now).std(correction=0) + 0.5)
        return argument

    def _fused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, call, out = self._key(), ops.fused_call(func, args, kwargs), run_operation(func, args, kwargs)
        self._silence(key, AttentionProduct(ops.fused_result(out), call.q.shape[:-1], call.q, call.k, call.v))
        return out

    def _unknown(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], calls: Sequence[FusedCall], result: Tensor
    ) -> None:
        key = self._key()
        call = call_by(self.formats[key].convention if key in self.formats else None, calls)
        self._silence(key, AttentionProduct(result, call.q.shape[:-1], call.q, call.k, call.v, call.heads_first))

    def _weights(self, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
        super()._weights(func, args, out)
        possible = [f for f in reversed(self._factors) if f.may_become(out)]
        queries, keys = out.shape[-2:]  # prefer complete columns, no heads among the queries, then the latest
        factors = min(possible, key=lambda f: (keys - f.shape[1], f.shape[0] != queries), default=None)
        known = factors is not None and self._undecided()
        made_of = [some_queries(part) for part in factors.laid_out(args[0])] if factors and known else [], factors
        known_weights = {*self._pending, *(w for w, _ in self._met)}
        self._made_of = {w: m for w, m in self._made_of.items() if w in known_weights} | {self._pending[-1]: made_of}

    def _product(self, args: tuple[Any, ...], out: Tensor) -> None:
        seen = dict(self._count)
        super()._product(args, out)
        if seen == self._count:
            self._used_again(args, out)
        if seen == self._count and not out.is_complex():
            turned = [out, out.mT] if out.shape[-1] == out.shape[-2] else [out]  # scores may be k · q
            samples = [some_queries(m) for m in turned] if self._undecided() else []
            unused = [f for f in self._factors if not f.used]
            self._factors = [*unused[-3:], _Factors(args[0], args[1].mT, out.numel(), out.shape[-2:], samples)]
            self._operands = [*self._operands[-6:], Memory(args[0]), Memory(args[1])]

    def _undecided(self) -> bool:
        return any(site.scores_are_products is None for site in self.formats.values())

    def _used_again(self, args: tuple[Any, ...], out: Tensor) -> None:
        """Ablate a further product of weights already multiplied with V, or of a V already multiplied with weights."""
        for left, right in (args, (args[1].mT, args[0].mT)):
            for weights, key in self._spent:
                if weights.holds(left) and key in self.formats:
                    if torch.equal(right, right[..., :1, :].expand_as(right)):  # it only sums the weights
                        self.tokens.sums.add(key)
                    grouped = by_image_and_head(right, self.batch, self.formats[key].folding)
                    if grouped is not None:
                        self.tokens.again[key] = off_device(sketch(grouped))
                    out.zero_()
                    return
            for weights, key in self._cut:
                if weights.overlaps(left):
                    self.tokens.parts.add(key)
                    out.zero_()
                    return
            for values, key in self._values:
                if values.holds(right):
                    self.tokens.mixed.add(key)
                    out.zero_()
                    return
            for met, path in self._met:
                if (
                    path == self._running[-1]
                    and left.shape[-2:] == met.shape[-2:]
                    and left.numel() == met.shape.numel()
                ):
                    self.tokens.rivals.add((path, self._count[path] - 1))

    def _explicit(self, args: tuple[Any, ...], out: Tensor) -> None:
        taken = self._take_weights(args)
        if taken is None:
            return
        call, key = taken[0], self._key()
        met = [*(w.memory for w in call.weights), Memory(call.applied)]
        self._spent = [*self._spent, *((memory, key) for memory in met)][-32:]
        cut = [w.memory for w in call.weights if call.part is None and w.shape.numel() > call.applied.numel()]
        self._cut = [*self._cut, *((memory, key) for memory in cut)][-8:]
        made = [self._made_of[w] for w in reversed(call.weights) if w in self._made_of]
        scores, factors = next((m for m in made if m[1] is not None), ([], None))
        q = k = None
        if factors is not None and self._are_products(key, scores, factors):
            factors.used = True
            q, k = factors.q, factors.k
            if call.part is not None and q.shape[-2] == call.weights[-1].shape[-2]:
                q = q[..., call.part, :]
        result = call.result(out)
        if call.folded_heads and q is not None and q.shape[:-1] != result.shape[:-1]:
            q = q.reshape(*result.shape[:-1], -1)
        self._silence(key, AttentionProduct(result, result.shape[:-1], q, k, call.values))

    def _are_products(self, key: SiteKey, scores: list[Tensor], factors: _Factors) -> bool:
        """Check that scores are the products, up to a mix of heads and a part that is the same for all images.

        This is assumed until `SiteFormat.decide` has seen two images.
        """
        site = self.formats.get(key)
        if site is None:
            return True
        if site.scores_are_products is None:
            for kept, samples in ((site.scores, scores), (site.products, factors.samples)):
                by_image = [by_image_and_head(sample, self.batch, site.folding) for sample in samples]
                known = [t[:2] for t in by_image if t is not None]
                if len(known) < len(samples):
                    site.scores_are_products = False
                kept += map(list, zip(*known, strict=True))
        return site.scores_are_products is not False

    def _silence(self, key: SiteKey, product: AttentionProduct) -> None:
        """Overwrite the result, and keep sketches of the operands."""
        site = self.formats.get(key)
        self._count[key[0]] = key[1] + 1
        if any(operand.holds(product.v) for operand in self._operands):
            self.tokens.mixed.add(key)
        self._values = [*self._values[-7:], (Memory(product.v), key)]
        if site is not None:
            self._keep_tokens(key, site, product)
        content = None
        if self.marks is None:
            content = product.query_as_result()
        elif key in self.marks and site is not None and key in self.tokens.sites:
            site.mark_strength = site.mark_strength or product.strong()  # one strength for all batches
            content = product.marked_result(self.marks[key], site.folding, site.mark_strength)
        product.overwrite(content)

    def _keep_tokens(self, key: SiteKey, site: SiteFormat, product: AttentionProduct) -> None:
        v, q, k = (
            None if t is None else by_image_and_head(t, self.batch, site.folding)
            for t in (product.v, product.q, product.k)
        )
        if v is not None:
            # Queries replace results, so a rounding in them reaches all later sites.
            self._precision = coarsest(*(precision_of(t) for t in (v, q, k) if t is not None), self._precision)
            self.tokens.sites[key] = SiteTokens(
                v=off_device(sketch(v)),
                heads=off_device(project(v)) if v.shape[2] < self.by_head else None,
                q=None if q is None else off_device(sketch(q)),
                k=None if k is None else off_device(sketch(k)),
                queries=product.lead[-1],
                dtype=self._precision,
                device=v.device,
                within=tuple(self._open),
            )


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
