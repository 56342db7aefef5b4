"""Hooks of a watched step: they go with the object that they are for, end no step, and do nothing in copies of a model.

They are set on the modules themselves. PyTorch's global hooks would leave no trace in copies, but a model that is
compiled in the step would be broken into many graphs by them, with a warning.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class WeakHook:
    """Call a method of an object that it holds weakly, where tensors may be read.

    An error does not end the step: it becomes the object's attribute ``error``. A copy or a pickle of a module that has
    this hook has a function of the standard library in its place that does nothing, so that neither needs this package.

    Args:
        method: a bound method of the object.
    """

    def __init__(self, method: Any) -> None:
        self._method: weakref.WeakMethod[Any] = weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> None:
        """Call the method, unless the object is no more, or a function is compiled or a CUDA graph captured."""
        if torch.compiler.is_compiling():
            return
        method: Any = self._method()
        if method is None or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            return
        try:
            method(*args)
        except Exception as error:
            method.__self__.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes any arguments, and returns None


def add_hook(register: Callable[..., RemovableHandle], method: Any, **options: Any) -> RemovableHandle:
    """Register a `WeakHook`; a run that is dropped without being closed leaves none behind.

    Args:
        register: such as ``module.register_forward_pre_hook``.
        method: a bound method of the object that the hook is for.
        options: keyword arguments of ``register``.

    Returns:
        The handle that removes the hook. It is also removed when the object is no more.
    """
    handle = register(WeakHook(method), **options)
    weakref.finalize(method.__self__, handle.remove).atexit = False
    return handle


def is_recomputed() -> bool:
    """Whether a forward runs inside a backward, as activation checkpointing repeats one that has been seen already."""
    return bool(torch._C._current_graph_task_id() != -1)


def compiles(modules: Iterable[nn.Module]) -> bool:
    """Whether any of these modules, or any function so far, is compiled: a hook would cause a recompilation."""
    if any(
        m._compiled_call_impl is not None or "_orig_mod" in m._modules or isinstance(m, torch.jit.ScriptModule)
        for m in modules
    ):
        return True
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    return dynamo is not None and any(map(callable, dynamo.cached_backends.values()))
