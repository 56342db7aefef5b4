"""Run a forward pass without leaving a trace: modes, flags, buffers and random state are as before afterwards."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def isolated_forward(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, in which nothing that training can see is changed for good.

    Restored afterwards, also after an exception: the ``training`` flag of every submodule (each its own), every
    buffer, the random state of torch, CUDA, NumPy and Python, the autocast cache and PyTorch's attention fast path.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # not inference mode: a cache the model fills must stay usable
        modules = all_modules(model)
        stack.enter_context(_eval_mode(modules))
        stack.enter_context(_buffers_restored(modules))
        stack.enter_context(random_state_restored(model))
        stack.enter_context(_autocast_cache_off())
        stack.enter_context(_mha_fast_path_off())
        if "torch._dynamo" in sys.modules:  # only then can anything be compiled; importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    modules = [m for m in modules if m.training]
    for module in modules:
        module.training = False  # not .eval(): methods overridden by users may do more than set the flag
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def _buffers_restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    before = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for module, name, buffer, version, value in before:
            if buffer._version != version:
                buffer.copy_(value)
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer


@contextmanager
def random_state_restored(model: nn.Module) -> Iterator[None]:
    """The random state of torch, CUDA (on the model's devices), NumPy and Python is as it was afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state others use is kept
    parameters = model.parameters() if torch.cuda.is_initialized() else ()
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _autocast_cache_off() -> Iterator[None]:
    # A weight cast without gradients must not be found in the cache by the training step.
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _mha_fast_path_off() -> Iterator[None]:
    # nn.MultiheadAttention's inference kernel computes attention where nothing can see it.
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Every module once, in no order of use: what `model.modules()` gives, whose nested generators take far longer."""
    found, waiting = {id(model): model}, [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def model_device_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating type that the model's first parameter has; float32 on the CPU for a model without any."""
    parameter: Tensor | None = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.device("cpu"), torch.float32
    return parameter.device, parameter.dtype
