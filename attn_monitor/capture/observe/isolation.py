"""Run a forward pass without side effects: modes, flags, buffers and random state are restored afterwards."""

from __future__ import annotations

import random
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attn_monitor.capture.observe.model_state import HeldState
from attn_monitor.capture.observe.model_state import all_modules as all_modules
from attn_monitor.capture.observe.parameter_writes import parameters_restored, was_watched
from attn_monitor.errors import UnsupportedAttentionError

Value = TypeVar("Value")


@contextmanager
def isolated_forward(model: nn.Module) -> Iterator[None]:
    """Run the body in evaluation mode without gradients, and restore the state that training can see.

    After the body, or an exception in it, this restores: the ``training`` flag of every submodule, the values of every
    buffer, parameters that the forward writes to, the modules' attributes, hook tables and classes (see `HeldState`),
    the random state of torch, CUDA, NumPy and Python, the autocast cache and PyTorch's attention fast path. One warning
    per model lists changes that cannot be restored.
    """
    with ExitStack() as stack:
        stack.enter_context(_exchanged(_isolated.get, _isolated.set, True))
        stack.enter_context(torch.inference_mode(False))  # operations cannot be observed in inference mode
        stack.enter_context(torch.no_grad())  # a cache that the model fills must stay usable for training
        modules = all_modules(model)
        stack.enter_context(_eval_mode(modules))
        if may_be_sharded() and are_sharded(modules):  # FSDP keeps its own state in attributes and parameters
            stack.enter_context(_values_restored(_buffers(modules)))
        else:
            stack.enter_context(_state_restored(model, modules))
        stack.enter_context(_nothing_logged(modules))
        stack.enter_context(random_state_restored(model))
        # A training step must not reuse a weight that was cast without gradients.
        stack.enter_context(_exchanged(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False))
        # nn.MultiheadAttention's inference kernel hides attention from the observer.
        mha = torch.backends.mha
        stack.enter_context(_exchanged(mha.get_fastpath_enabled, mha.set_fastpath_enabled, False))
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and nothing is compiled before
            stack.enter_context(_uncompiled())
        stack.enter_context(_flex_attention_uncompiled())
        yield


@contextmanager
def _exchanged(read: Callable[[], Value], write: Callable[[Value], object], value: Value) -> Iterator[None]:
    """Change a setting for the body."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _attribute_exchanged(owner: Any, name: str, value: Any) -> AbstractContextManager[Any]:
    return _exchanged(partial(getattr, owner, name), partial(setattr, owner, name), value)


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly: by PyTorch's switch from 2.6 on, else without the function that compiles frames."""
    if hasattr(torch.compiler, "set_stance"):
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager
    return _attribute_exchanged(sys.modules["torch._dynamo.eval_frame"], "set_eval_frame", lambda callback: None)


_isolated = ContextVar("isolated", default=False)


def is_isolated() -> bool:
    """Return whether the current forward is a probe instead of training."""
    return _isolated.get()


@contextmanager
def _eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    modules = [m for m in modules if getattr(m, "training", False)]  # frozen TorchScript has no such flag
    for module in modules:
        module.training = False  # not .eval(), which users may override
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def _state_restored(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the modules' parameters, buffers and attributes, and warn once per model of what cannot be restored."""
    lost: list[str] = []
    held = HeldState(modules, thorough=not was_watched(model))
    try:
        with (
            parameters_restored(model, held.modules, lost.append),
            _values_restored([*_buffers(held.modules), *held.tensors]),
        ):
            yield
    finally:
        lost += held.restore()
        news = [path for path in lost if path not in _REPORTED.setdefault(model, set())]
        if news:
            _REPORTED[model].update(news)
            _report.get()(
                f"{type(model).__name__} changes {', '.join(news[:5])}{' and more' * (len(news) > 5)} when it runs, "
                "which cannot be restored after the probe, so training may differ by it. Keep it in a buffer or a "
                "plain attribute, or pass a forward= that does not change it"
            )


_report: ContextVar[Callable[[str], None]] = ContextVar("report", default=warnings.warn)


def reporting(report: Callable[[str], None]) -> AbstractContextManager[None]:
    """Send the message on what cannot be restored to ``report`` instead of Python's warnings."""
    return _exchanged(_report.get, _report.set, report)


@contextmanager
def _nothing_logged(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Ignore calls of ``self.log`` in a LightningModule's forward, since a probe is not a training batch."""
    loggers = [vars(m) for m in modules if hasattr(type(m), "log_dict") and hasattr(type(m), "configure_optimizers")]
    names = ("log", "log_dict")
    before: list[dict[str, Any]] = [{name: held[name] for name in names if name in held} for held in loggers]
    for held in loggers:
        held["log"] = held["log_dict"] = _ignore
    try:
        yield
    finally:
        for held, own in zip(loggers, before, strict=True):
            for name in names:
                held.pop(name, None)
            held.update(own)


def _ignore(*_: object, **__: object) -> None:
    pass


_REPORTED: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def _buffers(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [b for m in modules for b in m._buffers.values() if b is not None and not b.is_meta]


@contextmanager
def _values_restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the values of tensors by copying whole storages.

    This covers writes through ``.data`` or another view, works for tensors made in inference mode, and does not change
    the version that autograd checks, which may have saved a buffer for a pending backward.
    """
    storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
    others: list[tuple[Tensor, Tensor]] = []
    for tensor in {id(t): t for t in tensors}.values():
        if type(tensor) is Tensor and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:
                storages[storage._cdata] = storage, storage.clone()
        else:
            others.append((tensor, tensor.clone()))
    try:
        yield
    finally:
        for storage, value in storages.values():
            if storage.nbytes() == value.nbytes():  # else the model has resized the storage
                storage.copy_(value)
        for tensor, copy in others:
            tensor.copy_(copy)


@contextmanager
def random_state_restored(model: nn.Module) -> Iterator[None]:
    """Restore the random state of torch, CUDA (on the model's devices), NumPy and Python afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state others use is kept
    parameters = model.parameters() if torch.cuda.is_initialized() else ()
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _flex_attention_uncompiled() -> AbstractContextManager[Any]:
    # Outside torch.compile it compiles its own wrapper, which fails under force_eager.
    flex, switch = sys.modules.get("torch.nn.attention.flex_attention"), "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    if flex is None:
        return nullcontext()
    if hasattr(flex, switch):
        return _attribute_exchanged(flex, switch, True)
    return _attribute_exchanged(flex, "torch", _TorchThatRefusesToCompile())  # before PyTorch 2.9


class _TorchThatRefusesToCompile:
    """Stands for ``torch`` in the module of flex attention: before PyTorch 2.9, no observer sees it run eagerly."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def compile(self, *args: Any, **settings: Any) -> Any:
        if not is_isolated():  # training, in another thread
            return torch.compile(*args, **settings)
        raise UnsupportedAttentionError(
            f"the model calls flex_attention, which can be observed from PyTorch 2.9 on (here {torch.__version__}). "
            "Update PyTorch, or use F.scaled_dot_product_attention with a mask"
        )


def model_device_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of the first floating-point parameter; CPU and float32 for a model without one."""
    parameter: Tensor | None = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.device("cpu"), torch.float32
    return parameter.device, parameter.dtype


def may_be_sharded() -> bool:
    """Return whether torch.distributed is initialised, without which FSDP cannot shard parameters."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP manages the parameters, so that every forward must run to its end to reshard them."""
    return are_sharded(all_modules(model))


def are_sharded(modules: Sequence[nn.Module]) -> bool:
    """Return the same as `is_sharded`, of all modules of a model."""
    bases = {base.__name__ for kind in {*map(type, modules)} for base in kind.__mro__}
    return any("FSDP" in name or "FullySharded" in name for name in bases)
