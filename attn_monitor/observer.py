"""Watch a forward pass: which module is running, and which attention operations it dispatches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attn_monitor import operations as ops
from attn_monitor.layout import PatchConv
from attn_monitor.operations import Observation, Query

SiteKey = tuple[str, int]
"""Where attention ran: module path, and its how-manieth attention within one forward (modules may be shared)."""


class Done(BaseException):
    """Leaves a forward pass once all that was wanted has been seen; no ordinary `except` catches it."""


class AttentionObserver(TorchDispatchMode):
    """Calls ``report(key, observation)`` for each attention operation run inside the watched modules.

    ``query(key)`` says which row is wanted there, or None to let the operation pass unread. ``verify=False`` skips
    the comparison with the operation's output; ``last`` names the site after which nothing is needed any more.
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
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.report, self.query, self.verify, self.last = report, query, verify, last
        self.batch, self.channels = images.shape[:2]
        self.convs: list[PatchConv] = []  # convolutions on the images before the first attention
        self.products = 0
        self._running: list[str] = []
        self._count: dict[str, int] = {}
        self._pending: list[ops.PendingSoftmax] = []

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
        # PyTorch calls no hooks for `Done`, which is no `Exception`: close what is still open.
        if self._running:
            self._running.clear()
            self._pending.clear()
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if ops.is_fused(func):
            return self._fused(func, args, kwargs)
        out = func(*args, **kwargs)
        if func in ops.SOFTMAX:
            pending = ops.pending_softmax(func, args, out)
            self._pending += [pending] if pending else []
        elif func in ops.PRODUCT:
            self.products += 1
            if self._pending:
                self._explicit(args)
        elif func is torch.ops.aten.convolution.default:
            self._convolution(args, out)
        elif ops.may_be_fused(func, args):
            self._unknown(func, args, kwargs, out)
        return out

    def _key(self) -> SiteKey:
        path = self._running[-1]
        return path, self._count.get(path, 0)

    def _seen(self, key: SiteKey, seen: Observation | None) -> None:
        self._count[key[0]] = key[1] + 1
        if seen is not None:
            self.report(key, seen)
        if key == self.last:
            raise Done

    def _fused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, call = self._key(), ops.fused_call(func, args, kwargs)
        query = self.query(key)
        if query is not None and key == self.last and not self.verify:  # its output is not needed by anyone
            self._seen(key, ops.observe_fused(call, None, query, verify=False))
        out = func(*args, **kwargs)
        self._seen(key, None if query is None else ops.observe_fused(call, out, query, verify=self.verify))
        return out

    def _explicit(self, args: tuple[Any, ...]) -> None:
        key = self._key()
        query = self.query(key)
        # Sites are counted alike whether they are read or passed over, so an unread one is recognised too.
        seen = ops.observe_explicit(self._pending, args, self.batch, 0 if query is None else query)
        if seen is not None:
            self._pending.clear()
            self._seen(key, None if query is None else seen)

    def _unknown(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        key = self._key()
        query = self.query(key)
        seen = ops.observe_unknown(func, args, kwargs, out, 0 if query is None else query)
        if seen is not None:
            self._seen(key, None if query is None else seen)

    def _convolution(self, args: tuple[Any, ...], out: Tensor) -> None:
        if self._count or out.ndim != 4 or out.shape[0] != self.batch:
            return
        kernel, stride = tuple(args[1].shape[2:]), tuple(args[3])
        disjoint = kernel == stride and args[0].shape[1] == self.channels
        self.convs.append(PatchConv((out.shape[2], out.shape[3]), stride, disjoint))
