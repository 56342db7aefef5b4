"""Watch a forward pass: which module is running, and which attention operations it dispatches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attn_monitor.capture import operations as ops
from attn_monitor.capture import unknown_operations as unknown
from attn_monitor.capture.attention_rows import CallingConvention, ExplicitCall, FusedCall, Query
from attn_monitor.capture.error_origin import errors_from
from attn_monitor.capture.observation import Observation, SiteKey
from attn_monitor.capture.patch_grids import PatchConv
from attn_monitor.grid_geometry import GridGeometry


class StopForward(BaseException):
    """Leaves a forward pass once all that was wanted has been observed; no `except Exception` of a model catches it."""


@errors_from("model")
def run_operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run what the model has dispatched."""
    return func(*args, **kwargs)


class _Weights(NamedTuple):
    """What a softmax made of scores, that has not met its V yet."""

    weights: Tensor
    path: str  # where it ran
    largest_logits: Tensor | None  # (..., Q) of the scores, where they are asked for


class AttentionObserver(TorchDispatchMode):
    """Calls ``report(key, observation)`` for each attention operation run inside the watched modules.

    ``query(key)`` says which row is wanted there, or None to let the operation pass unread. ``verify=False`` skips
    the comparison with the operation's output; ``last`` names the site after which nothing is needed any more, except
    to see whether attention goes on where none of the ``known`` sites is, if they are given: then it is ``beyond``;
    ``conventions`` are those already known of operations from outside PyTorch; ``logits`` keeps the largest score of
    each query, which of explicit attention can be had only before its softmax.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        report: Callable[[SiteKey, Observation], None],
        query: Callable[[SiteKey], Query | None],
        *,
        images: Tensor,
        verify: bool = True,
        last: SiteKey | None = None,
        known: Collection[SiteKey] = (),
        conventions: Mapping[SiteKey, CallingConvention] | None = None,
        logits: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.report, self.query, self.verify, self.last = report, query, verify, last
        self.conventions, self.logits, self.known = conventions or {}, logits, known
        self.passed_last, self.beyond = False, False
        self.batch, self.channels, *self.size = images.shape
        self.convs: list[PatchConv] = []  # convolutions on pixels, and on what they made of whole images
        self._cropped = False  # the convolutions now running see a part of the images
        self.products = 0
        self._running: list[str] = []
        self._count: dict[str, int] = {}
        self._scores: list[tuple[int, ...]] = []  # shapes of the last few products
        self._pending: list[_Weights] = []

    def watch(self, modules: Iterable[tuple[str, nn.Module]]) -> ExitStack:
        """Hooks on these (path, module) pairs; leaving the returned stack removes them.

        The path "" is the whole forward, whichever of the model's methods it goes through.
        """
        stack = ExitStack()
        stack.callback(self._unwind)
        for path, module in modules:
            if path == "":
                self._enter(path)()
                continue
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its operations are seen all the same
                continue
            stack.enter_context(module.register_forward_pre_hook(self._enter(path)))
            stack.enter_context(module.register_forward_hook(self._leave(path), always_call=True))
        return stack

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not self._running:
                self.__enter__()  # type: ignore[no-untyped-call]
            self._running.append(path)

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # Called even when another pre-hook failed before ours ran: then there is nothing to leave.
            if self._running and self._running[-1] == path:
                self._running.pop()
                if not self._running:
                    self._pending.clear()
                    self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        return hook

    def _unwind(self) -> None:
        # PyTorch calls no hooks for `StopForward`, which is no `Exception`: close what is still open.
        if self._running:
            self._running.clear()
            self._pending.clear()
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @errors_from("monitor")
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, kind = kwargs or {}, ops.kind_of(func)
        if kind == "fused":
            return self._fused(func, args, kwargs)
        out = run_operation(func, args, kwargs)
        if (kind == "softmax" and ops.attention_softmax(func, args, out)) or (
            kind == "elementwise" and self._made_of_scores(out)
        ):
            self._weights(args, out)
        elif kind == "product":
            self.products += 1
            self._product(args[-2:], out)
        elif kind == "convolution":
            self._convolution(args, out)
        elif kind == "foreign" and unknown.looks_like_attention(args):
            self._foreign(func, args, kwargs, out)
        return out

    def _weights(self, args: tuple[Any, ...], out: Tensor) -> None:
        largest = args[0].amax(-1) if self.logits else None
        self._pending = [*self._pending[-31:], _Weights(out, self._running[-1], largest)]  # gates' never meet a V

    def _made_of_scores(self, out: Any) -> bool:
        return isinstance(out, Tensor) and any(
            out.shape[-2:] == scores[-2:] and out.numel() == math.prod(scores) for scores in self._scores
        )

    def _product(self, args: tuple[Any, ...], out: Tensor) -> None:
        if self._pending:
            self._explicit(args, out)
        self._scores = [*self._scores[-3:], tuple(out.shape)]

    def _key(self) -> SiteKey:
        path = self._running[-1]
        return path, self._count.get(path, 0)

    def _finish(self, key: SiteKey, seen: Observation | None, scope: str | None = None) -> None:
        """Count the attention that has just run, and report what was read of it."""
        self._count[key[0]] = key[1] + 1
        if seen is not None:
            self.report(key, replace(seen, scope=self._running[-1] if scope is None else scope))
        if self.passed_last or (self.known and key not in self.known):
            self.beyond = key not in self.known
            raise StopForward
        if key == self.last:
            self.passed_last = True
            if not self.known:
                raise StopForward
            self._running.insert(0, "")  # the mode stays on to the end of the forward, or to the next attention

    def _fused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, call = self._key(), ops.fused_call(func, args, kwargs)
        query = self.query(key)
        if query is not None and key == self.last and not self.verify and not self.known:  # nobody needs its result
            self._finish(key, ops.observe_fused(call, None, query))
        out = run_operation(func, args, kwargs)
        result = ops.fused_result(out) if self.verify else None
        self._finish(key, None if query is None else ops.observe_fused(call, result, query))
        return out

    def _explicit(self, args: tuple[Any, ...], out: Tensor) -> None:
        taken = self._take_weights(args)
        if taken is None:
            return
        call, scope = taken
        key, seen = self._key(), None
        query = self.query(key)
        if query is not None:
            seen = ops.observe_explicit(call, out if self.verify else None, self.batch, query)
        self._finish(key, seen, scope)

    def _take_weights(self, args: tuple[Any, ...]) -> tuple[ExplicitCall, str] | None:
        """The product as attention, and the module around all of it; others' softmaxes go on waiting for their V."""
        call = ops.explicit_call([p.weights for p in self._pending], args, self.batch)
        if call is None:
            return None
        used = [w for w in call.weights if ops.is_same(call.applied, w)][-1:] or call.weights
        taken = [p for p in self._pending if any(p.weights is u for u in used)]
        self._pending = [p for p in self._pending if not any(p.weights is u for u in used)]
        scope = common_path([self._running[-1], *(p.path for p in taken)])
        logits = taken[0].largest_logits if len(taken) == 1 else None  # of several, none are the scores
        return replace(call, weights=used, largest_logits=logits), scope

    def _foreign(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        result = unknown.first_tensor(out)
        calls = [] if result is None else unknown.candidate_calls(func, args, kwargs, result)
        if result is not None and calls:
            self._unknown(func, args, kwargs, calls, result)

    def _unknown(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], calls: Sequence[FusedCall], result: Tensor
    ) -> None:
        key, seen = self._key(), None
        query = self.query(key)
        if query is not None:
            seen = unknown.observe_unknown(func, args, kwargs, calls, result, query, self.conventions.get(key))
        self._finish(key, seen)

    def _convolution(self, args: tuple[Any, ...], out: Tensor) -> None:
        if out.ndim != 4 or out.shape[0] != self.batch:
            return
        x, kernel = args[0], tuple(args[1].shape[2:])
        stride, padding = (tuple(a) * (2 // len(a)) for a in args[3:5])  # one number stands for both axes
        on_pixels = x.shape[1] == self.channels
        if on_pixels:
            self._cropped = any(seen < whole for seen, whole in zip(x.shape[2:], self.size, strict=True))
        disjoint = on_pixels and kernel == stride
        if disjoint or not self._cropped:
            geometry = GridGeometry(tuple(-float(p) for p in padding), tuple(map(float, stride)))
            seen = None if [*x.shape[2:]] == self.size else (x.shape[2], x.shape[3])
            self.convs.append(PatchConv((out.shape[2], out.shape[3]), geometry, disjoint, seen))
            if disjoint and seen is not None:
                self._saw_other_pixels(x)

    def _saw_other_pixels(self, x: Tensor) -> None:
        """A convolution ran on pixels (B, C, H, W) that are not the images as they are."""


def common_path(paths: Sequence[str]) -> str:
    """Path of the innermost module that holds all of these."""
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(p.split(".") for p in paths), strict=False))
    return ".".join(parts[0] for parts in shared)
