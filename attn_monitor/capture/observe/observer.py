"""Observe a forward pass: track the running module and the attention operations that it dispatches."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from attn_monitor.capture.observe import kinds
from attn_monitor.capture.observe.attention_rows import Query
from attn_monitor.capture.observe.error_origin import errors_from, is_monitor_error
from attn_monitor.capture.observe.kinds.functions import observed_functions
from attn_monitor.capture.observe.kinds.kernels import function_call
from attn_monitor.capture.observe.kinds.kind import (
    AttentionCall,
    AttentionKind,
    ForwardState,
    Operation,
    receives_no_context,
)
from attn_monitor.capture.observe.module_paths import common_path
from attn_monitor.capture.observe.observation import Observation, RefusedObservation, SiteKey


class StopForward(BaseException):
    """Leave a forward pass once everything requested has been observed.

    It is no `Exception`, so that a model's `except Exception` does not catch it.
    """


@functools.lru_cache(maxsize=1024)
def _quantises(func: Any) -> bool:
    return "linear_dynamic" in str(func)


@functools.lru_cache(maxsize=1024)
def _is_of_interest(func: Any) -> bool:
    """Return whether an observer looks at calls of an operation even where no softmax is followed."""
    return kinds.kind_of(func) is not None or func is torch.ops.aten.convolution.default


class AttentionObserver(TorchDispatchMode):
    """Report each attention operation that runs inside the watched modules.

    Args:
        images: (B, C, *size), those that the model runs on.
        report: Called with (key, observation) for each operation that is read.
        query: Returns the query to read at a site; None to skip the operation, as all are by default.
        queries: Every query that ``query`` may return.
        verify: Compare row·V with the operation's output.
        last: The site after which the forward can be left; None to run to its end.
        known: All sites, to detect attention elsewhere, which sets ``beyond``. If given, the forward goes on to the
            next attention after ``last``.
        logits: Keep each query's largest score, which explicit attention has only before its softmax.
    """

    supports_higher_order_operators = True
    discovers = False
    """Whether attention may be found that earlier forwards have not shown."""
    sees_every_operation = False
    """Whether `_dispatched` receives operations that cannot be attention too, such as views and linear layers."""

    def __init__(
        self,
        images: Tensor,
        report: Callable[[SiteKey, Observation], None] = lambda *_: None,
        query: Callable[[SiteKey], Query | None] = lambda _: None,
        *,
        queries: Collection[Query] = (),
        verify: bool = True,
        last: SiteKey | None = None,
        known: Collection[SiteKey] = (),
        logits: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.report, self.query, self.verify, self.last, self.known = report, query, verify, last, known
        self.passed_last, self.beyond = False, False
        self.stopped = False  # the forward was left; nothing more is observed if the model continues
        self.batch = len(images)
        self.failure: Exception | None = None  # a bug in the observer itself, which then stops observing
        self.quantised = False  # linear layers are quantised by the range of the whole tensor
        self.elsewhere = ""  # path of a module that ran in another thread, where operations are not observed
        self._thread = threading.get_ident()
        self.entered: dict[str, int] = {}  # number of attentions before a module's first call
        self._count: dict[str, int] = {}
        self._examines = False  # an autograd function, which runs again meanwhile
        self.state = ForwardState(len(images), queries, logits)
        self._kinds: dict[type[AttentionKind], AttentionKind] = {kind: kind(self.state) for kind in kinds.KINDS}

    def watch(self, modules: Iterable[tuple[str, nn.Module]]) -> ExitStack:
        """Hook these (path, module) pairs until the returned stack is closed.

        The path "" stands for the whole forward, through any of the model's methods.
        """
        stack = ExitStack()
        stack.callback(self._unwind)
        stack.enter_context(observed_functions(self._function, known=not self.discovers))
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
            if not self.state.modules:
                self.__enter__()  # type: ignore[no-untyped-call]
            self.state.modules.append(path)
            self.entered.setdefault(path, sum(self._count.values()))

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # always_call runs this even if another pre-hook failed before ours: then there is nothing to leave.
            here = threading.get_ident() == self._thread
            if here and self.state.modules and self.state.path == path:
                self.state.modules.pop()
                if not self.state.modules:
                    self._exit_mode()

        return hook

    def _unwind(self) -> None:
        # PyTorch calls no hooks after `StopForward`, which is no `Exception`.
        if self.state.modules:
            self.state.modules.clear()
            self._exit_mode()

    def _exit_mode(self) -> None:
        for kind in self._kinds.values():
            kind.forget()
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._passes_over(func):  # nearly all: a snapshot of all layers waits for each of them
            return func(*args, **(kwargs or {}))
        operation = Operation(func, args, kwargs or {})
        if self.failure is None and not self.stopped:
            try:
                in_backward = torch._C._current_graph_task_id() != -1  # of gradients that the forward itself takes
                return self._backward(operation) if in_backward else self._dispatched(operation)
            except Exception as error:
                if not is_monitor_error(error):
                    raise
                self.failure = error  # raised after the forward: TorchScript may not survive an exception in it
        return operation.run()

    def _passes_over(self, func: Any) -> bool:
        if self.sees_every_operation or _is_of_interest(func) or torch.is_inference_mode_enabled():
            return False
        return not any(kind.follows_others for kind in self._kinds.values())

    @errors_from("monitor")
    def _dispatched(self, operation: Operation) -> Any:
        """Run an operation by the kind of attention that it concerns, if there is one, and read what is attention."""
        if torch.is_inference_mode_enabled():  # composite operations are not decomposed in it
            with self:
                out = operation.run_in_parts()
            if out is not NotImplemented:
                return out
        kind = kinds.kind_of(operation.func)
        if kind is not None and any(isinstance(a, Tensor) and a.is_nested for a in operation.args):
            return self._nested(operation)
        out, call = (operation.run(), None) if kind is None else self._kinds[kind].run(operation)
        if call is not None:
            self._attended(call)
            return call.returned(out)
        if kind is None:
            for each in self._kinds.values():
                each.on_other_operation(operation, out)
        if operation.func is torch.ops.aten.convolution.default:
            self._convolution(operation.args, out)
        elif _quantises(operation.func):
            self.quantised = True
        return out

    def _function(self, cls: type[Function], forward: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run the forward of an autograd function; it is attention itself if none is seen among its operations."""
        if threading.get_ident() != self._thread or not self.state.modules or self._examines or self.stopped:
            return forward(*args)
        before = dict(self._count)
        out = forward(*args)
        if self._count != before or self.failure is not None:
            return out
        given = args if receives_no_context(cls) else args[1:]
        self._examines = True
        try:
            with _disable_current_modes():  # what is computed here is not the model's
                self._see_function(Operation(cls, given, {}), out)
        except Exception as error:
            if not is_monitor_error(error):
                raise
            self.failure = error
        finally:
            self._examines = False
        return out

    @errors_from("monitor")
    def _see_function(self, operation: Operation, out: Any) -> None:
        call = function_call(operation, out)
        if call is not None:
            self._attended(call)

    def _backward(self, operation: Operation) -> Any:
        """Run an operation of a backward pass, which is no attention; subclasses may change its result."""
        return operation.run()

    def _nested(self, operation: Operation) -> Any:
        """Refuse attention on nested tensors, whose rows have different lengths."""
        out = operation.run()
        if kinds.is_attention_alone(operation.func):
            reason = "its tensors are nested (sequences of several lengths in one), and have no rows of one length"
            seen = RefusedObservation(op=str(operation.func), batch=1, heads=1, queries=0, keys=0, reason=reason)
            self._finish(self._key(), replace(seen, scope=self.state.path))
        return out

    def _key(self) -> SiteKey:
        path = self.state.path
        return path, self._count.get(path, 0)

    def _attended(self, call: AttentionCall) -> None:
        """Read the wanted rows of an attention that has run."""
        key = self._key()
        query, seen = self.query(key), None
        if query is not None:
            seen = call.read(query, verify=self.verify)
            seen = replace(seen, scope=common_path([key[0], *call.paths]))
        self._finish(key, seen)

    def _finish(self, key: SiteKey, seen: Observation | None) -> None:
        """Count an attention that has run, and report the observation if there is one."""
        self._count[key[0]] = key[1] + 1
        if seen is not None:
            self.report(key, seen)
        if self.passed_last or (self.known and key not in self.known):
            self.beyond = key not in self.known
            self._stop()
        if key == self.last:
            self.passed_last = True
            if not self.known:
                self._stop()
            self.state.modules.insert(0, "")  # keeps the mode on until the forward ends or the next attention

    def _stop(self) -> NoReturn:
        self.stopped = True
        raise StopForward

    def _convolution(self, args: tuple[Any, ...], out: Tensor) -> None:
        """Take note of a convolution that has run; subclasses override this."""
