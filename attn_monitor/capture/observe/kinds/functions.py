"""Read `torch.autograd.Function`, behind which kernels stand that PyTorch's dispatcher does not see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import Function

from attn_monitor.capture.observe.kinds.kernels import known_kernels

FunctionForward = Callable[..., Any]
Observe = Callable[[type[Function], FunctionForward, tuple[Any, ...]], Any]


@contextmanager
def observed_functions(observe: Observe, *, known: bool) -> Iterator[None]:
    """Route the forward of autograd functions through ``observe``.

    ``apply`` may have been taken from a class when a module was imported (``attention = FlashAttention.apply``), but it
    looks for ``forward`` in each call.

    Args:
        observe: Called with (class, its own forward, the arguments of forward), in any thread that runs one; returns
            the result.
        known: Only those that were found to be attention in an earlier forward, else all that exist by now.
    """
    classes: Collection[Any] = known_kernels() if known else [*_subclasses(Function)]
    own = {cls: f for cls in classes if isinstance(f := cls.__dict__.get("forward"), staticmethod)}
    try:
        for cls, forward in own.items():
            cls.forward = staticmethod(_routed(observe, cls, forward.__func__))
        yield
    finally:
        for cls, forward in own.items():
            cls.forward = forward


def _routed(observe: Observe, cls: type[Function], forward: FunctionForward) -> FunctionForward:
    def routed(*args: Any) -> Any:
        return observe(cls, forward, args)

    routed.__wrapped__ = forward  # type: ignore[attr-defined]  # for its signature
    return routed


def _subclasses(cls: type[Function]) -> Iterator[type[Function]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
