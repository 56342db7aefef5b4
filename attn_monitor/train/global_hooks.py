"""Hooks on all modules or optimizers: they go with the object that they are for, and end no step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def add_global_hook(register: Callable[..., RemovableHandle], method: Any, **options: Any) -> RemovableHandle:
    """Register a global hook that calls a method of an object, where tensors may be read.

    It holds the object weakly, so that a run that is dropped without being closed leaves no hook behind. An error does
    not end the step: it becomes the object's attribute ``error``.

    Args:
        register: such as `torch.nn.modules.module.register_module_forward_pre_hook`.
        method: a bound method of the object.
        options: keyword arguments of ``register``.

    Returns:
        The handle that removes the hook. It is also removed when the object is no more.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        alive: Any = reference()
        if alive is None or not _can_read():
            return
        try:
            alive(*args)
        except Exception as error:
            alive.__self__.error = error

    call.__module__ = method.__module__  # so that lists of hooks show what each is for
    handle = register(call, **options)
    weakref.finalize(method.__self__, handle.remove).atexit = False
    return handle


def compiles(modules: Iterable[nn.Module]) -> bool:
    """Whether any of these modules, or any function so far, is compiled: a hook would cause a recompilation."""
    if any(
        m._compiled_call_impl is not None or "_orig_mod" in m._modules or isinstance(m, torch.jit.ScriptModule)
        for m in modules
    ):
        return True
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    return dynamo is not None and any(map(callable, dynamo.cached_backends.values()))


def _can_read() -> bool:
    """Whether a hook may read tensors: not while a function is compiled or a CUDA graph is captured."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or capturing)
