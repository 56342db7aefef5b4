"""A forward pass in which attention mixes no tokens, so that each token can be read at every depth.

Every attention product returns its own query (or nothing, or marks) in place of what attention would have given: then a
token holds the same part of the image in the last layer as in the first, unless the model itself moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture import operations as ops
from attn_monitor.capture.attention_rows import FusedCall, widen
from attn_monitor.capture.error_origin import errors_from
from attn_monitor.capture.observation import SiteKey
from attn_monitor.capture.observer import AttentionObserver, run_operation
from attn_monitor.capture.token_places.attention_product import AttentionProduct, by_image_and_head, explains_scores
from attn_monitor.capture.token_places.random_projections import coarsest, noise_like, precision_of, project, sketch
from attn_monitor.capture.token_places.token_parameters import ParameterUses, TokenParameter
from attn_monitor.capture.token_places.tokens import Call, SiteFormat, SiteTokens, Tokens
from attn_monitor.capture.unknown_operations import call_by


class SilentObserver(AttentionObserver):
    """Silences attention and keeps sketches of the tokens at the sites whose ``formats`` are given.

    ``marks`` (B, Q) bool for a site: then results are nothing but strong noise at the marked queries. ``nudged`` are
    parameters that the model sees changed; ``uses`` notes how it uses them. Of sites with less than ``by_head`` keys, V
    of each head is kept too.
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
    ) -> None:
        super().__init__(lambda *_: None, lambda _: None, images=images, verify=False)
        self.formats, self.marks, self.nudged, self.uses, self.by_head = formats, marks, nudged, uses, by_head
        self.tokens = Tokens()
        self._factors: list[tuple[Tensor, Tensor, Tensor]] = []  # of the last few products
        self._scores_of: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]] = {}
        self._spent: list[tuple[Tensor, SiteKey]] = []  # weights that have met a V: another product may use them
        self._values: list[tuple[Tensor, SiteKey]] = []  # the last few V
        self._calls: dict[str, int] = {}
        self._open: list[Call] = []
        self._precision = torch.float64

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
            if (entering := next(self._sketches((args, kwargs)), None)) is not None:
                self.tokens.entries[call] = entering

        return hook

    def _end(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._open and self._open[-1][0] == path:
                self.tokens.exits[self._open.pop()] = tuple(self._sketches(out))

        return hook

    def _sketches(self, values: Any) -> Iterator[Tensor]:
        """Of what could be tokens among a module's arguments or results."""
        for x in _tensors(values):
            if x.ndim == 3 and x.is_floating_point() and self.batch in x.shape[:2]:
                yield sketch((x if x.shape[0] == self.batch else x.transpose(0, 1))[:, None])

    @errors_from("monitor")
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.uses is not None:
            self.uses.note(func, args)
        if self.nudged:
            args = tuple(self._nudge(a) for a in args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _nudge(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._nudge(a) for a in argument)
        if isinstance(argument, Tensor):
            for parameter in self.nudged:
                now = parameter.tensor
                if now is not None and ops.is_same(argument, now):
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

    def _weights(self, args: tuple[Any, ...], out: Tensor) -> None:
        super()._weights(args, out)
        fitting = [f for f in self._factors if f[2].numel() == out.numel() and f[2].shape[-2:] == out.shape[-2:]]
        waiting = {id(pending.weights) for pending in self._pending}
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
                if ops.is_same(left, weights) and key in self.formats:
                    values = by_image_and_head(right, self.batch, self.formats[key].folding)
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
        self._silence(key, AttentionProduct(result, result.shape[:-1], q, k, call.values))

    def _are_products(self, key: SiteKey, scores: Tensor, product: Tensor) -> bool:
        """Whether scores are the products, up to a mix of heads and what is the same for all images."""
        site = self.formats.get(key)
        if site is None:
            return True
        if site.scores_are_products is None:
            s, p = (by_image_and_head(t, self.batch, site.folding) for t in (scores, product))
            site.scores_are_products = s is not None and p is not None and self.batch > 1 and explains_scores(p, s)
        return site.scores_are_products

    def _silence(self, key: SiteKey, product: AttentionProduct) -> None:
        """Replace the result, and keep sketches of what came in."""
        site = self.formats.get(key)
        self._count[key[0]] = key[1] + 1
        if any(ops.is_same(right, product.v) or ops.is_same(left, product.v) for left, right, _ in self._factors):
            self.tokens.mixed.add(key)
        self._values = [*self._values[-7:], (product.v, key)]
        if site is not None:
            self._keep_tokens(key, site, product)
        content = None
        if self.marks is None:
            content = product.query_as_result()
        elif key in self.marks and site is not None and key in self.tokens.sites:
            content = product.marked_result(self.marks[key], site.folding)
        product.overwrite(content)

    def _keep_tokens(self, key: SiteKey, site: SiteFormat, product: AttentionProduct) -> None:
        v, q, k = (
            None if t is None else by_image_and_head(t, self.batch, site.folding)
            for t in (product.v, product.q, product.k)
        )
        if v is not None:
            # What the queries are made of goes on to the later sites, as queries stand in place of results.
            self._precision = coarsest(*(precision_of(t) for t in (v, q, k) if t is not None), self._precision)
            self.tokens.sites[key] = SiteTokens(
                v=sketch(v),
                heads=project(v) if v.shape[2] < self.by_head else None,
                q=None if q is None else sketch(q),
                k=None if k is None else sketch(k),
                queries=product.lead[-1],
                dtype=self._precision,
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
