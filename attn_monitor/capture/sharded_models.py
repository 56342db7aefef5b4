"""Run a part of a model that FSDP shards, and refuse models with tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from attn_monitor.capture.observe.forward import Forward, default_forward
from attn_monitor.capture.observe.isolation import may_be_sharded
from attn_monitor.capture.observe.observer import StopForward
from attn_monitor.errors import UnsupportedAttentionError

_METHOD = "_attn_monitor_forward"


def forward_within(root: nn.Module, forward: Forward = default_forward) -> Forward:
    """Return a forward that calls a part of an FSDP module through ``root``, the outermost one.

    FSDP gathers parameters when a unit's forward starts, and treats the first unit that runs as the outermost. The
    returned function therefore enters the units around the model through their forward hooks, with their mixed
    precision and offloading, and reshards all units afterwards. Without FSDP it is the same as ``forward``.

    Args:
        root: The outermost FSDP module.
        forward: How to call the model inside.

    Returns:
        A function of (model, images), to be given as ``forward=``; ``model`` is ``root`` or a module inside.

    Example:
        >>> import torch
        >>> root = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> tuple(forward_within(root)(root, torch.randn(1, 3, 2, 2)).shape)
        (1, 2)
    """

    def run(model: nn.Module, images: Tensor) -> Any:
        if not may_be_sharded():
            return forward(model, images)
        around, below = _units_around(root, model), _units_in(model)
        if not around and not below:
            return forward(model, images)
        failed: list[BaseException] = []

        def guarded(images: Tensor) -> None:
            try:
                forward(model, images)
            except (Exception, StopForward) as error:  # the units around must end their forward
                failed.append(error)

        with _freed_afterwards(around, below):
            _through(around, guarded, images)
            if failed:
                raise failed[0]

    return run


def _is_unit(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, (_fsdp2().FSDPModule, FullyShardedDataParallel))


def _fsdp2() -> Any:
    """Return the module that holds FSDP2."""
    from torch.distributed import fsdp

    if hasattr(fsdp, "FSDPModule"):
        return fsdp
    from torch.distributed._composable import fsdp as composable  # PyTorch before 2.6

    return composable


def _dtensor() -> Any:
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:  # PyTorch 2.4
        from torch.distributed._tensor import DTensor  # type: ignore[attr-defined]
    return DTensor


def _units_in(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_unit(module)]


def _units_around(root: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Return the FSDP units around the model, outermost first, without the model itself."""
    known = dict(root.named_modules())
    path = next((p for p, module in known.items() if module is model), "")
    parts = path.split(".") if path else []
    chain = [known[".".join(parts[:depth])] for depth in range(len(parts))]
    return [module for module in chain if _is_unit(module)]


def _through(units: list[nn.Module], action: Callable[[Tensor], None], images: Tensor) -> None:
    """Run the action inside the nested forwards of these units, outermost first."""
    if not units:
        return action(images)
    return _as_forward(units[0], lambda x: _through(units[1:], action, x), images)


def _as_forward(unit: nn.Module, action: Callable[[Tensor], None], images: Tensor) -> None:
    """Run ``action`` in place of an FSDP unit's forward, so that its parameters are gathered meanwhile."""
    fsdp2 = _fsdp2()
    if isinstance(unit, fsdp2.FSDPModule):
        setattr(unit, _METHOD, action)
        try:
            fsdp2.register_fsdp_forward_method(unit, _METHOD)
            getattr(unit, _METHOD)(images)
        finally:
            delattr(unit, _METHOD)
        return
    wrapper: Any = unit  # FullyShardedDataParallel
    inner = wrapper.module
    own = vars(inner).get("forward")

    def restore() -> None:
        vars(inner).pop("forward", None)
        if own is not None:
            inner.forward = own

    def redirected(images: Tensor) -> None:
        restore()  # the module inside may be the model itself
        action(images)

    inner.forward = redirected
    try:
        wrapper(images)
    finally:
        restore()


@contextmanager
def _freed_afterwards(around: list[nn.Module], below: list[nn.Module]) -> Iterator[None]:
    """Reshard all units afterwards: FSDP keeps the outermost unit's parameters for a backward that never comes here."""
    try:
        yield
    except Exception:
        for unit in around[:1] or _outermost(below):
            _end_forward(unit)
        raise
    finally:
        for unit in (*around, *below):
            _free(unit)


def _end_forward(unit: Any) -> None:
    """Reset the FSDP2 state of a forward that was cut short."""
    if not isinstance(unit, _fsdp2().FSDPModule):
        return
    if hasattr(unit, "reset_iter_state"):
        unit.reset_iter_state()
    else:  # PyTorch before 2.14
        unit._get_fsdp_state()._state_ctx.iter_forward_root = None


def _outermost(units: list[nn.Module]) -> list[nn.Module]:
    inside = {id(m) for unit in units for m in unit.modules() if m is not unit}
    return [unit for unit in units if id(unit) not in inside]


def _free(unit: Any) -> None:
    from torch.distributed.fsdp import ShardingStrategy
    from torch.distributed.fsdp._runtime_utils import _reshard

    if isinstance(unit, _fsdp2().FSDPModule):
        unit.reshard()
        return
    # FullyShardedDataParallel has no public method to reshard.
    if unit._handle is not None and unit.sharding_strategy is not ShardingStrategy.NO_SHARD:
        _reshard(unit, unit._handle, True)


def refuse_split_parameters(model: nn.Module) -> ExitStack:
    """Make modules raise `UnsupportedAttentionError` if they run with split parameters, until the stack is closed.

    FSDP has gathered the parameters by then. Under tensor parallelism each device computes some of the heads only, in
    plain tensors that look like a complete model's.
    """
    stack = ExitStack()
    if not may_be_sharded():
        return stack
    dtensor = _dtensor()
    for path, module in model.named_modules():
        if any(isinstance(p, dtensor) for p in module.parameters(recurse=False)):
            stack.enter_context(module.register_forward_pre_hook(_refusal(path, type(model).__name__)))
    return stack


def _refusal(path: str, model: str) -> Callable[..., None]:
    dtensor = _dtensor()

    def hook(module: nn.Module, args: Any) -> None:
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if not isinstance(parameter, dtensor):
                continue
            mesh = parameter.device_mesh
            split = [p for d, p in enumerate(parameter.placements) if p.is_shard() and mesh.size(d) > 1]
            if split:
                raise UnsupportedAttentionError(
                    f"{model}: its parameter {name!r} is split over devices while its module runs ({split[0]} of a "
                    "DTensor), expected a whole one. Under tensor parallelism each device computes some of the heads "
                    "only, and no map is shown of a part of them: watch a model that is trained with DDP or FSDP. If "
                    "FSDP shards it by a unit further out, pass forward=forward_within(the outermost FSDP module)"
                )

    return hook
