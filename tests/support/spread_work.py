"""Loops of one's own in several processes, each with a `Watch`: DDP, and parameters or states that are spread."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from attn_monitor import Watch
from tests.support.distributed_work import IMAGES, PROCESSES, RANK, Seen
from tests.support.helpers import tiny_vit
from tests.support.sharded_work import full

STEPS = 3
Step = Callable[[Tensor], Any]


def ddp(model: nn.Module) -> Step:
    return stepper(DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def optimizer_states_spread(model: nn.Module) -> Step:
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    return stepper(DistributedDataParallel(model), optimizer)


def split(model: nn.Module) -> Step:
    """Tensor parallelism: each process has some of the heads."""
    plan: dict[str, Any] = {}
    for path, _ in model.named_modules():
        if path.endswith(("attn.qkv", "mlp.fc1")):
            plan[path] = ColwiseParallel()
        elif path.endswith(("attn.proj", "mlp.fc2")):
            plan[path] = RowwiseParallel()
    for block in model.blocks:
        block.attn.num_heads //= PROCESSES
        block.attn.attn_dim = getattr(block.attn, "attn_dim", 32) // PROCESSES
    parallelize_module(model, init_device_mesh("cpu", (PROCESSES,)), plan)
    return stepper(model, torch.optim.SGD(model.parameters(), lr=0.1))


def partitioned(model: nn.Module) -> Step:
    """What stage 3 leaves: parameters that are empty between forwards, which every process must gather together."""
    whole = {parameter: parameter.data for parameter in model.parameters()}
    for number, parameter in enumerate(whole):
        parameter.ds_id = number

    def gather(*_: Any) -> None:
        dist.barrier()
        for parameter, values in whole.items():
            parameter.data = values

    model.register_forward_pre_hook(gather)
    gather()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = stepper(model, optimizer)

    def run(images: Tensor) -> None:
        step(images)
        for parameter in whole:
            parameter.data, parameter.grad = torch.empty(0), None

    for parameter in whole:
        parameter.data = torch.empty(0)
    run.weights = whole  # type: ignore[attr-defined]
    return run


def stepper(model: nn.Module, optimizer: Any) -> Step:
    def step(images: Tensor) -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    return step


WAYS: dict[str, Callable[[nn.Module], Step]] = {
    "DDP": ddp,
    "optimizer states spread": optimizer_states_spread,
    "tensor parallelism": split,
    "partitioned": partitioned,
}


def loops(folder: Path) -> Seen:
    """Each way, without and with a watch."""
    dist.init_process_group("gloo")
    return {way: [trained(None, way), trained(folder / way, way)] for way in WAYS}


def trained(folder: Path | None, way: str) -> Seen:
    torch.manual_seed(3)
    model = tiny_vit()
    step_with = WAYS[way](model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = None if folder is None else Watch(model, IMAGES[:2], folder=folder, every_n_train_steps=1)
        for step in range(STEPS):
            if watch is not None:
                watch.step(step)
            step_with(IMAGES[2 * RANK : 2 * RANK + 2])
        if watch is not None:
            watch.close(STEPS)
    kept = getattr(step_with, "weights", None)
    weights = list(kept.values()) if kept else [full(parameter) for parameter in model.parameters()]
    told = [str(w.message) for w in caught if "attn_monitor" in str(w.message)]
    return {"weights": weights, "warnings": told}
