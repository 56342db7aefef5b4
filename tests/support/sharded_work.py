"""What each of several processes does in test_sharded.py; every function returns what its process saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from attn_monitor import AttentionMapCallback, AttentionMonitor, ProbeBatch, forward_within
from tests.faults.test_harmless import Recorded
from tests.support.distributed_work import IMAGES, PROCESSES, Seen, attention_of
from tests.support.fsdp import CPUOffloadPolicy, DTensor, MixedPrecisionPolicy, fully_shard
from tests.support.helpers import Distillation, error_of, loader, tiny_vit, trainer

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Sharded(Distillation):
    """Student and teacher, each with its head, sharded by FSDP2; ``units`` says which modules are units."""

    def __init__(self, units: str = "backbone", **policy: Any) -> None:
        super().__init__()
        self.units, self.policy, self.losses = units, policy, []
        self.student = nn.Sequential(self.student_backbone, nn.Linear(32, 8))
        self.teacher = nn.Sequential(self.teacher_backbone, nn.Linear(32, 8)).requires_grad_(False)
        del self.student_backbone, self.teacher_backbone, self.head

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        # Without True, FSDP2 leaves the teacher whole after its forward, as no backward follows that shards it again.
        settings = {"mesh": mesh, "reshard_after_forward": True, **self.policy}
        for network in (self.student, self.teacher):
            if self.units != "one":
                for block in network[0].blocks:
                    fully_shard(block, **settings)
            if self.units == "nested":
                fully_shard(network[0], **settings)
            if self.units == "backbone":
                fully_shard(network[0], **settings)
                fully_shard(network[1], **settings)
            else:
                fully_shard(network, **settings)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        student = self.student(batch) if self.units != "backbone" else self.student[1](self.student[0](batch))
        with torch.no_grad():
            teacher = self.teacher(batch) if self.units != "backbone" else self.teacher[1](self.teacher[0](batch))
        loss = nn.functional.cross_entropy(student.float(), (teacher.float() / 0.04).softmax(-1))
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                teacher.lerp_(student, 0.1)


class Whole(pl.Callback):
    """Which parameters are whole where the monitor has just looked."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.looks = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.looks += 1
        units = [m for m in trainer.strategy.model.modules() if isinstance(m, FullyShardedDataParallel)]
        if units:
            handles = [unit._handle for unit in units if unit._handle is not None]
            self.names |= {
                name
                for handle in handles
                for name in handle.flat_param._fqns
                if handle.flat_param._full_param_padded.untyped_storage().size()
            }
        else:
            self.names |= set(whole_parameters(pl_module))


class OnCPU(FSDPStrategy):
    """Lightning's strategy for FSDP1, which insists on CUDA only when it is asked for by name."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def _setup_model(self, model: nn.Module) -> nn.Module:
        settings = {**self.kwargs, "device_id": torch.device("cpu"), "mixed_precision": self.mixed_precision_config}
        return FullyShardedDataParallel(model, **settings)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Without Lightning's offloading to the CPU, which PyTorch frees too early where everything is on the CPU.

        Processes die of it with some releases (Lightning's issue 21804, PyTorch's 188989).
        """
        config = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, config):
            return self.model.state_dict()


class Averageless(Recorded):
    """Without a moving average, whose parameters FSDP1 would have cut elsewhere than the student's."""

    def on_train_batch_end(self, *_: Any) -> None:
        pass


def two() -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy  # from Lightning 2.4 on

    return ModelParallelStrategy(data_parallel_size=PROCESSES, tensor_parallel_size=1)


WAYS: dict[str, Callable[[], tuple[pl.LightningModule, Seen]]] = {
    "backbone is a unit": lambda: (Sharded(), {"strategy": two()}),
    "backbone inside a unit": lambda: (Sharded("around"), {"strategy": two()}),
    "units in units": lambda: (Sharded("nested"), {"strategy": two()}),
    "one unit": lambda: (Sharded("one"), {"strategy": two()}),
    "mixed precision": lambda: (Sharded("around", mp_policy=BF16), {"strategy": two()}),
    "CPU offload": lambda: (Sharded("nested", offload_policy=CPUOffloadPolicy(pin_memory=False)), {"strategy": two()}),
    "FSDP1": lambda: (Averageless(), {"strategy": OnCPU(auto_wrap_policy=ModuleWrapPolicy({Block}))}),
    "FSDP1, one unit": lambda: (Averageless(), {"strategy": OnCPU()}),
    "FSDP1, mixed precision": lambda: (
        Averageless(),
        {"strategy": OnCPU(auto_wrap_policy=ModuleWrapPolicy({Block})), "precision": "bf16-mixed"},
    ),
}


def harmless(folder: Path) -> Seen:
    """Each way to shard, without and with a snapshot of all layers at every step."""
    return {way: {"alone": run(folder / way / "alone", way), **watched(folder / way, way)} for way in WAYS}


def watched(folder: Path, way: str) -> Seen:
    watch, whole = AttentionMapCallback(every_n_train_steps=1, layers="all", on_error="raise"), Whole()
    trained = run(folder / "watched", way, watch, whole)
    return {"watched": trained, "attention": attention_of(watch), "whole": whole.names, "looks": whole.looks}


def run(folder: Path, way: str, *callbacks: pl.Callback) -> Seen:
    """Everything that training leaves behind, in whole tensors."""
    pl.seed_everything(3)
    module, settings = WAYS[way]()
    running = trainer(folder, *callbacks, **{"devices": PROCESSES, "max_steps": 4, **settings})
    states: dict[str, Tensor] = {}

    class Keep(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            states.update({k: full(v) for k, v in trainer.strategy.lightning_module_state_dict().items()})

    running.callbacks.append(Keep())
    running.fit(module, loader(16, batch_size=2), loader(8, batch_size=2))
    optimizer = [full(v) for s in running.optimizers[0].state.values() for v in s.values()]
    return {
        "weights": states,
        "optimizer": dict(enumerate(optimizer)),
        "losses": {"": torch.tensor(module.losses)},
        "torch": {"": torch.get_rng_state()},
    }


def full(value: Any) -> Tensor:
    return (
        value.full_tensor().detach().clone() if isinstance(value, DTensor) else torch.as_tensor(value).detach().clone()
    )


def saved_in_shards(folder: Path) -> Seen:
    """Watched, with a sharded checkpoint of Lightning's at every other step."""
    watch = AttentionMapCallback(ProbeBatch(IMAGES[:2]), every_n_train_steps=2)
    save = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    running = trainer(folder, watch, save, devices=PROCESSES, max_steps=4, strategy=two(), enable_checkpointing=True)
    running.fit(Sharded(), loader(40))
    return {}


def by_hand(folder: Path) -> Seen:
    """Without Lightning: FSDP2 through its outermost unit, failures on the way, and tensor parallelism."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (PROCESSES,))
    probe, whole = ProbeBatch(IMAGES[:3]), network()
    alone = AttentionMonitor(probe, layers="all").snapshot({"backbone": whole[0]}, step=0)
    outside = AttentionMonitor(probe, distributed=True)
    seen: Seen = {"outside": error_of(outside, {"backbone": shard(network(), mesh)[0]})}
    sharded, twin = shard(network(), mesh), shard(network(), mesh)
    inside = AttentionMonitor(probe, layers="all", distributed=True, forward=forward_within(sharded))
    together = inside.snapshot({"backbone": sharded[0]}, step=0)
    seen["rows"] = [(together.rows("backbone", i), alone.rows("backbone", i)) for i in range(2)]
    seen["left whole"] = whole_parameters(sharded)
    losses = [step(sharded)]
    failing = sharded[0].blocks[1].register_forward_pre_hook(_fail)
    seen["fails"] = error_of(inside, {"backbone": sharded[0]})
    failing.remove()
    seen["left whole"] += whole_parameters(sharded)
    losses += [step(sharded), step(sharded)]
    seen["losses"] = losses, [step(twin) for _ in losses]
    seen["again"] = bool(inside.snapshot({"backbone": sharded[0]}, step=1).rows("backbone").isfinite().all())
    seen["one of two"] = one_of_two_fails(probe, mesh)
    seen["stuck"] = stuck_after_failure(probe, mesh)
    seen["split"] = error_of(AttentionMonitor(probe, distributed=True), {"backbone": split_heads(mesh)})
    dist.destroy_process_group()
    return seen


def network() -> nn.Sequential:
    """The same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(tiny_vit(), nn.Linear(32, 4))


def shard(model: nn.Sequential, mesh: Any) -> nn.Sequential:
    """Blocks are units in the one around the whole; the backbone itself is none."""
    for block in model[0].blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def one_of_two_fails(probe: ProbeBatch, mesh: Any) -> Seen:
    """The student's forward fails in all processes; the teacher in the same outermost unit is watched."""
    torch.manual_seed(0)
    root = nn.Sequential(tiny_vit(), tiny_vit())
    whole = AttentionMonitor(probe).snapshot({"teacher": root[1]}, step=0).rows("teacher")
    for block in (*root[0].blocks, *root[1].blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)
    root[0].blocks[1].register_forward_pre_hook(_fail)
    monitor = AttentionMonitor(probe, distributed=True, alone=True, forward=forward_within(root))
    snapshot = monitor.snapshot({"student": root[0], "teacher": root[1]}, step=0)
    return {"roles": snapshot.roles, "rows": (snapshot.rows("teacher"), whole), "whole": whole_parameters(root)}


def stuck_after_failure(probe: ProbeBatch, mesh: Any) -> bool:
    """Whether FSDP2 still thinks that it is in the forward that failed, which would cost a GPU its waiting for data."""
    unit = fully_shard(network()[0], mesh=mesh)
    failing = unit.blocks[1].register_forward_pre_hook(_fail)
    error_of(AttentionMonitor(probe, distributed=True, forward=forward_within(unit)), {"backbone": unit})
    failing.remove()
    return unit._get_fsdp_state()._state_ctx.iter_forward_root is not None


def whole_parameters(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]


def _fail(module: nn.Module, args: Any) -> None:
    raise ValueError("deliberate")


def step(model: nn.Module) -> float:
    """The loss of one training step on the same images."""
    loss = model(IMAGES[:2]).square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    return float(loss)


def split_heads(mesh: Any) -> nn.Module:
    """A ViT whose heads are dealt out to the processes: what each computes looks like a model of half the heads."""
    model = tiny_vit()
    plan = {"attn.qkv": ColwiseParallel(), "attn.proj": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
        block.attn.num_heads //= PROCESSES
        block.attn.attn_dim //= PROCESSES
    with torch.no_grad():
        model(IMAGES[:1])  # it does run
    return model
