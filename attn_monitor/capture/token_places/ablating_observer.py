"""Ablate attention in a forward, so that it mixes no tokens and each token can be read at every depth.

Every attention product returns its own query (or zeros, or marks) instead of its result. Then a token depends on the
same part of the image in the last layer as in the first, unless the model itself moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map

from attn_monitor.capture.observe import kinds
from attn_monitor.capture.observe.attention_rows import Sequences, widen
from attn_monitor.capture.observe.error_origin import errors_from
from attn_monitor.capture.observe.kinds.attention_product import AttentionProduct, by_image_and_head
from attn_monitor.capture.observe.kinds.explicit import ExplicitAttention
from attn_monitor.capture.observe.kinds.explicit_call import ExplicitCall
from attn_monitor.capture.observe.kinds.kind import AttentionCall, Operation
from attn_monitor.capture.observe.memory import Memory
from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.observer import AttentionObserver
from attn_monitor.capture.observe.random_projections import (
    SIZE,
    coarsest,
    noise_like,
    off_device,
    precision_of,
    project,
    sketch,
)
from attn_monitor.capture.token_places.token_parameters import ParameterUses, TokenParameter
from attn_monitor.capture.token_places.tokens import Call, SiteFormat, SiteTokens, Tokens
from attn_monitor.capture.token_places.traced_products import TracedProducts


class AblatingObserver(AttentionObserver):
    """Ablate attention and keep sketches of the tokens.

    Args:
        images: (B, C, *size), the input of the forward.
        formats: Layout of the tokens at each site to read.
        marks: For each site (B, Q) bool: results are strong noise at the marked queries and zero elsewhere. Without
            marks (None), results are the queries.
        nudged: Parameters to which the model's operations see noise added.
        uses: Records how the model uses its small parameters.
        by_head: Sites with fewer keys than this have V of each head kept too.
        exchanged: For each call (B, T) bool: the call receives noise as its tokens, the same in every image except at
            the exchanged tokens.
        sketch_size: Numbers in the sketch of a value or query.
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
        sketch_size: int = SIZE,
    ) -> None:
        super().__init__(images)
        self.sees_every_operation = uses is not None or bool(nudged)
        self.formats, self.marks, self.nudged, self.uses, self.by_head = formats, marks, nudged, uses, by_head
        self.exchanged, self.sketch_size = exchanged or {}, sketch_size
        self.tokens = Tokens()
        self._products = self._kinds[ExplicitAttention] = TracedProducts(self.state, formats, self.tokens)
        self._calls: dict[str, int] = {}
        self._open: list[Call] = []
        self._precision = torch.float64
        self._in_sequences = any(isinstance(site.folding, Sequences) for site in formats.values())

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
        _, tokens, channels = self._by_image(x).shape
        if tokens != exchanged.shape[1]:
            return x
        kept, others = noise_like((2, tokens, channels), x)
        noise = torch.where(exchanged[..., None].to(x.device), 4 * others, kept)
        tokens_first = self.batch in x.shape[1:2] and x.shape[0] != self.batch
        return noise.transpose(0, 1) if tokens_first else noise.reshape(x.shape)

    def _end(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._open and self._open[-1][0] == path:
                self.tokens.exits[self._open.pop()] = tuple(self._sketches(out))

        return hook

    def _sketches(self, values: Any) -> Iterator[Tensor]:
        """Sketch what could be tokens among a module's arguments or results, as (B, T, S)."""
        for x in _tensors(values):
            if self._could_be_tokens(x):
                yield off_device(sketch(self._by_image(x)[:, None]))

    def _could_be_tokens(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or is_functorch_wrapped_tensor(x):  # a tensor inside vmap cannot be projected
            return False
        if x.is_nested or x.ndim != 3 or not x.is_floating_point():
            return False
        return self.batch in x.shape[:2] or (self._in_sequences and x.shape[0] % self.batch == 0)

    def _by_image(self, x: Tensor) -> Tensor:
        """Return tokens as (B, T, C); sequences of one image are joined."""
        if self.batch in x.shape[:2]:
            return x if x.shape[0] == self.batch else x.transpose(0, 1)
        return x.reshape(self.batch, -1, x.shape[-1])

    @errors_from("monitor")
    def _dispatched(self, operation: Operation) -> Any:
        if self.uses is not None:
            self.uses.note(operation.func, operation.args)
        if self.nudged:
            operation = replace(operation, args=tuple(self._nudge(a) for a in operation.args))
        return super()._dispatched(operation)

    @errors_from("monitor")
    def _backward(self, operation: Operation) -> Any:
        out = super()._backward(operation)
        if kinds.kind_of(operation.func) is not None:  # gradients of attention mix no tokens either
            for gradient in _tensors(out):
                gradient.zero_()
        return out

    def _nudge(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._nudge(a) for a in argument)
        if isinstance(argument, Tensor):
            for parameter in self.nudged:
                now = parameter.tensor
                if now is not None and Memory(now).holds(argument):
                    with torch.inference_mode(False):  # the model may take views of it, as of a parameter
                        return argument + noise_like(argument.shape, argument) * (widen(now).std(correction=0) + 0.5)
        return argument

    def _attended(self, call: AttentionCall) -> None:
        key = self._key()
        product = call.product()
        if isinstance(call, ExplicitCall):
            product = self._products.with_operands(key, call, product)
        self._ablate(key, product)

    def _ablate(self, key: SiteKey, product: AttentionProduct) -> None:
        """Overwrite the result, and keep sketches of the operands."""
        site = self.formats.get(key)
        self._count[key[0]] = key[1] + 1
        self._products.see_attention(key, product)
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
                v=off_device(sketch(v, self.sketch_size)),
                heads=off_device(project(v, self.sketch_size)) if v.shape[2] < self.by_head else None,
                q=None if q is None else off_device(sketch(q, self.sketch_size)),
                k=None if k is None else off_device(sketch(k)),
                queries=product.queries(site.folding),
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
