"""Observe a forward pass: track the running module and the attention operations that it dispatches."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attn_monitor.capture import operations as ops
from attn_monitor.capture import unknown_operations as unknown
from attn_monitor.capture.attention_rows import CallingConvention, ExplicitCall, FusedCall, Query, Weights
from attn_monitor.capture.error_origin import errors_from, is_monitor_error
from attn_monitor.capture.observation import Observation, RefusedObservation, SiteKey
from attn_monitor.capture.patch_grids import PatchConv
from attn_monitor.grid import GridGeometry


class StopForward(BaseException):
    """Leave a forward pass once everything requested has been observed.

    It is no `Exception`, so that a model's `except Exception` does not catch it.
    """


@errors_from("model")
def run_operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that the model has dispatched."""
    return func(*args, **kwargs)


@errors_from("model")
def run_in_parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a composite operation as the operations that it consists of; return NotImplemented for a primitive one."""
    return func.decompose(*args, **kwargs) if isinstance(func, torch._ops.OpOverload) else NotImplemented


class AttentionObserver(TorchDispatchMode):
    """Report each attention operation that runs inside the watched modules.

    Args:
        report: Called with (key, observation) for each operation that is read.
        query: Returns the query to read at a site; None to skip the operation.
        images: (B, C, H, W), those that the model runs on.
        queries: Every query that ``query`` may return.
        verify: Compare row·V with the operation's output.
        last: The site after which the forward can be left; None to run to its end.
        known: All sites, to detect attention elsewhere, which sets ``beyond``. If given, the forward goes on to the
            next attention after ``last``.
        conventions: Known calling conventions of third-party operations.
        logits: Keep each query's largest score, which explicit attention has only before its softmax.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        report: Callable[[SiteKey, Observation], None],
        query: Callable[[SiteKey], Query | None],
        *,
        images: Tensor,
        queries: Collection[Query] = (),
        verify: bool = True,
        last: SiteKey | None = None,
        known: Collection[SiteKey] = (),
        conventions: Mapping[SiteKey, CallingConvention] | None = None,
        logits: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.report, self.query, self.verify, self.last = report, query, verify, last
        self.queries, self.conventions, self.logits, self.known = queries, conventions or {}, logits, known
        self.passed_last, self.beyond = False, False
        self.stopped = False  # the forward was left; nothing more is observed if the model continues
        self.batch, self.channels, *self.size = images.shape
        self._images = images.data_ptr(), images.stride()
        self.convs: list[PatchConv] = []  # convolutions on pixels, and on features of whole images
        self._cropped = False  # the current convolutions see a part of the images
        self.products = 0
        self.failure: Exception | None = None  # a bug in the observer itself, which then stops observing
        self.quantised = False  # linear layers are quantised by the range of the whole tensor
        self.elsewhere = ""  # path of a module that ran in another thread, where operations are not observed
        self._thread = threading.get_ident()
        self.entered: dict[str, int] = {}  # number of attentions before a module's first call
        self._running: list[str] = []
        self._count: dict[str, int] = {}
        self._scores: list[tuple[int, ...]] = []  # shapes of the last few products
        self._pending: list[Weights] = []  # softmaxes that have not met their V yet
        self._met: list[tuple[Weights, str]] = []  # softmaxes that have and are not freed, and the module

    def watch(self, modules: Iterable[tuple[str, nn.Module]]) -> ExitStack:
        """Hook these (path, module) pairs until the returned stack is closed.

        The path "" stands for the whole forward, through any of the model's methods.
        """
        stack = ExitStack()
        stack.callback(self._unwind)
        for path, module in modules:
            if path == "":
                self._enter(path)()
                continue
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its operations are observed anyway
                continue
            stack.enter_context(module.register_forward_pre_hook(self._enter(path)))
            stack.enter_context(module.register_forward_hook(self._leave(path), always_call=True))
        return stack

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if threading.get_ident() != self._thread:
                self.elsewhere = path or "(root)"
                return
            if not self._running:
                self.__enter__()  # type: ignore[no-untyped-call]
            self._running.append(path)
            self.entered.setdefault(path, sum(self._count.values()))

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # always_call runs this even if another pre-hook failed before ours: then there is nothing to leave.
            here = threading.get_ident() == self._thread
            if here and self._running and self._running[-1] == path:
                self._running.pop()
                if not self._running:
                    self._forget_weights()
                    self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        return hook

    def _unwind(self) -> None:
        # PyTorch calls no hooks after `StopForward`, which is no `Exception`.
        if self._running:
            self._running.clear()
            self._forget_weights()
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _forget_weights(self) -> None:
        self._pending, self._met = [], []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.failure is None and not self.stopped:
            try:
                return self._dispatched(func, args, kwargs or {})
            except Exception as error:
                if not is_monitor_error(error):
                    raise
                self.failure = error  # raised after the forward: TorchScript may not survive an exception in it
        return run_operation(func, args, kwargs or {})

    @errors_from("monitor")
    def _dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = ops.kind_of(func)
        if torch.is_inference_mode_enabled():  # composite operations are not decomposed in it
            with self:
                out = run_in_parts(func, args, kwargs)
            if out is not NotImplemented:
                return out
        if kind and any(isinstance(a, Tensor) and a.is_nested for a in args):
            return self._nested(kind, func, args, kwargs)
        if kind == "fused":
            return self._fused(func, args, kwargs)
        if kind == "product" and len(args) == 3 and self._call(args[1:]) is not None:
            return self._on_top_of(args[0], args[1:], **kwargs)
        out = run_operation(func, args, kwargs)
        if (kind == "softmax" and ops.attention_softmax(func, args, out)) or (
            kind == "elementwise" and self._made_of_scores(out)
        ):
            self._weights(func, args, out)
        elif kind == "product":
            self.products += 1
            self._product(args[-2:], out)
        elif kind == "convolution":
            self._convolution(args, out)
        elif "linear_dynamic" in str(func):
            self.quantised = True
        elif kind == "foreign" and unknown.looks_like_attention(args):
            self._foreign(func, args, kwargs, out)
        return out

    def _weights(self, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
        # Inputs of exp are logits up to a constant per query, so their maximum is unknown.
        largest = args[0].amax(-1) if self.logits and func is not torch.ops.aten.exp.default else None
        weights = ops.read_weights(out, self._running[-1], self.queries, largest)
        self._pending = [*self._pending[-31:], weights]  # bounded: softmaxes of gates never meet a V

    def _made_of_scores(self, out: Any) -> bool:
        return isinstance(out, Tensor) and any(
            out.shape[-2:] == scores[-2:] and out.numel() == math.prod(scores) for scores in self._scores
        )

    def _product(self, args: tuple[Any, ...], out: Tensor) -> None:
        before = dict(self._count)
        if self._pending or self._met:
            self._explicit(args, out)
        if self._count == before:  # not attention, whose output is never scores
            self._scores = [*self._scores[-3:], tuple(out.shape)]

    def _on_top_of(self, other: Tensor, args: tuple[Any, ...], beta: float = 1, alpha: float = 1) -> Tensor:
        """Run a fused product and addition (baddbmm) as two operations, since the product's result is needed."""
        out: Tensor = run_operation(torch.ops.aten.bmm.default, args, {})
        self.products += 1
        self._product(args, out)
        return out * alpha + other * beta if beta else out * alpha

    def _nested(self, kind: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Refuse attention on nested tensors, whose rows have different lengths."""
        if kind in ("fused", "softmax"):
            reason = "its tensors are nested (sequences of several lengths in one), and have no rows of one length"
            seen = RefusedObservation(op=str(func), batch=1, heads=1, queries=0, keys=0, reason=reason)
            self._finish(self._key(), seen)
        return run_operation(func, args, kwargs)

    def _key(self) -> SiteKey:
        path = self._running[-1]
        return path, self._count.get(path, 0)

    def _finish(self, key: SiteKey, seen: Observation | None, scope: str | None = None) -> None:
        """Count an attention that has run, and report the observation if there is one."""
        self._count[key[0]] = key[1] + 1
        if seen is not None:
            self.report(key, replace(seen, scope=self._running[-1] if scope is None else scope))
        if self.passed_last or (self.known and key not in self.known):
            self.beyond = key not in self.known
            self._stop()
        if key == self.last:
            self.passed_last = True
            if not self.known:
                self._stop()
            self._running.insert(0, "")  # keeps the mode on until the forward ends or the next attention

    def _stop(self) -> NoReturn:
        self.stopped = True
        raise StopForward

    def _fused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, call = self._key(), ops.fused_call(func, args, kwargs)
        query = self.query(key)
        if query is not None and key == self.last and not self.verify and not self.known:  # its result is not needed
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

    def _call(self, args: tuple[Any, ...]) -> ExplicitCall | None:
        """Interpret a product as attention by softmaxes that have not met a V yet, else by those that have."""
        call = ops.explicit_call(self._pending, args, self.batch)
        if call is not None and any(w.memory.overlaps(call.applied) for w in call.weights):
            return call
        return ops.call_again(self._met, args, self._running[-1]) or call

    def _take_weights(self, args: tuple[Any, ...]) -> tuple[ExplicitCall, str] | None:
        """Return the product as attention and the module around all of it; keep other softmaxes pending."""
        call = self._call(args)
        if call is None:
            return None
        used = [w for w in call.weights if w.memory.holds(call.applied)][-1:] or call.weights
        self._pending = [p for p in self._pending if p not in used]
        scope = common_path([self._running[-1], *(w.path for w in used)])
        met = [(w, p) for w, p in self._met if not w.memory.is_freed and w not in used]
        self._met = [*met, *((w, self._running[-1]) for w in used)]
        logits = used[0].largest_logits if len(used) == 1 else None  # several are ambiguous
        logits = logits[..., call.part] if logits is not None and call.part is not None else logits
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
            grid, size = (out.shape[2], out.shape[3]), (x.shape[2], x.shape[3])
            # A mirrored image has the same size; where orientation matters, accept only the image's own memory.
            tiled = geometry.unless_whole(grid, size) is None or (x.data_ptr(), x.stride()) == self._images
            seen = None if [*size] == self.size and tiled else size
            self.convs.append(PatchConv(grid, geometry, disjoint, seen))
            if disjoint and seen is not None:
                self._saw_other_pixels(x)

    def _saw_other_pixels(self, x: Tensor) -> None:
        """Handle a convolution on pixels (B, C, H, W) that are not the unchanged images; subclasses override this."""


def common_path(paths: Sequence[str]) -> str:
    """Return the path of the innermost module that contains all of these."""
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(p.split(".") for p in paths), strict=False))
    return ".".join(parts[0] for parts in shared)
