"""Attention maps from a Lightning Fabric loop on several devices: python examples/fabric.py [--devices 2]."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from lightly.loss import DINOLoss
from lightly.models.utils import update_momentum
from lightning.fabric import Fabric
from photographs import photographs, probe_images
from plain_pytorch import PROTOTYPES, cut, global_crop, local_crop, network, project, to_input
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.player.report import write_report
from attn_monitor.trackers.publisher import Publisher


def train(fabric: Fabric, options: argparse.Namespace) -> None:
    """DINO on several devices: each takes its own crops, and its own share of the probe."""
    fabric.seed_everything(fabric.global_rank)
    images = [v2.functional.resize(v2.functional.pil_to_tensor(image), 128) for image in photographs().values()]
    student, teacher = network(), network().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    trained, optimizer = fabric.setup(student, optimizer)  # gives all processes the weights of the first
    teacher = fabric.to_device(teacher)
    teacher.load_state_dict(student.state_dict())
    loss_function = fabric.to_device(DINOLoss(PROTOTYPES))
    shown = probe_images(128)
    probe = ProbeBatch(torch.stack([to_input(image) for image in shown.values()]), names=[*shown])
    monitor = AttentionMonitor(probe, distributed=True)  # every process calls snapshot() at the same steps
    writer = publisher = None
    if fabric.is_global_zero:
        writer = SummaryWriter(options.folder)
        archive = options.folder / "attn_monitor"
        publisher = Publisher([writer], probe, folder=archive, write_report=write_report)

    def look(step: int) -> None:
        # The modules themselves, not what setup() wrapped them in.
        snapshot = monitor.snapshot({"student": student[0], "teacher": teacher[0]}, step=step)
        if publisher is not None:
            publisher.publish(snapshot)
        entropy = snapshot.metrics["teacher", 3, "entropy", None]
        fabric.print(f"step {step:>4}  entropy {entropy:.3f}", flush=True)

    for step in range(options.steps):
        if step % options.every == 0:
            look(step)
        batch = [images[i] for i in torch.randint(len(images), (8,))]
        global_crops = fabric.to_device(cut(batch, global_crop, 2))
        local_crops = fabric.to_device(cut(batch, local_crop, 4))
        with torch.no_grad():
            targets = project(teacher, global_crops)
        loss = loss_function(targets, project(trained, global_crops) + project(trained, local_crops), 0.04)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        update_momentum(student, teacher, m=0.98)
    look(options.steps)
    if publisher is not None:
        publisher.close()
        writer.close()


def main() -> None:
    """Train as the command line says, then say where the logs are."""
    parser = argparse.ArgumentParser(description=__doc__)
    folder = Path("runs", "fabric", time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--folder", type=Path, default=folder, help="where to write (default: a new one below runs)")
    parser.add_argument("--accelerator", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--devices", type=int, default=2, help="how many devices, or processes on the CPU")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between two snapshots")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*weight_norm. is deprecated")  # of Lightly's projection head
    fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy="ddp")
    fabric.launch()
    train(fabric, options)
    fabric.print(f"logs are in {options.folder}")


if __name__ == "__main__":
    main()
