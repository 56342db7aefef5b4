"""Attention maps from a hand-written DINO loop, without Lightning: python examples/plain_pytorch.py [--wandb]."""

from __future__ import annotations

import argparse
import random
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import update_momentum
from photographs import photographs, probe_images
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from attn_monitor import AttentionMonitor, ProbeBatch, Publisher

PROTOTYPES = 256
to_input = v2.Compose(
    [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # what ProbeBatch undoes unless told otherwise
    ]
)
global_crop = v2.Compose([v2.RandomResizedCrop(64, (0.4, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4)])
local_crop = v2.Compose([v2.RandomResizedCrop(32, (0.1, 0.4)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4)])


class Network(nn.Module):
    """A small vision transformer and DINO's projection head."""

    def __init__(self) -> None:
        super().__init__()
        vit = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "num_classes": 0}
        self.backbone = VisionTransformer(**vit, dynamic_img_size=True)
        self.head = DINOProjectionHead(96, 256, 64, PROTOTYPES)

    def forward(self, crops: list[Tensor]) -> list[Tensor]:
        """Prototype scores of several batches of crops of one size."""
        scores: Tensor = self.head(self.backbone(torch.cat(crops)))
        return list(scores.chunk(len(crops)))


def cut(images: list[Tensor], crop: nn.Module, times: int) -> list[Tensor]:
    """Batches of random crops: the same images in each."""
    return [to_input(torch.stack([crop(image) for image in images])) for _ in range(times)]


def open_loggers(options: argparse.Namespace) -> list[Any]:
    """What a Publisher logs to; with an empty list it writes the archive and the latest pictures."""
    if options.archive_only:
        return []
    if options.wandb:
        import wandb

        run = wandb.init(project="dino", dir=options.folder)  # WANDB_MODE=offline needs no account
        run.define_metric("*", step_metric="trainer/global_step")
        return [run]
    return [SummaryWriter(options.folder)]


def train(options: argparse.Namespace) -> None:
    """DINO: the student learns to see in any crop what its own moving average sees in the global crops."""
    torch.manual_seed(0)
    draw = random.Random(0)
    # Shrunk once, as large photographs would only slow the crops down.
    images = [v2.functional.resize(v2.functional.pil_to_tensor(image), 128) for image in photographs().values()]
    student, teacher = Network(), Network()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss_function = DINOLoss(PROTOTYPES)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    watched = {"student": student.backbone, "teacher": teacher.backbone}
    shown = probe_images(128)
    monitor = AttentionMonitor(ProbeBatch(torch.stack([to_input(image) for image in shown.values()]), names=[*shown]))
    loggers = open_loggers(options)
    publisher = Publisher(loggers, folder=options.folder / "attn_monitor")

    def look(step: int) -> None:
        snapshot = monitor.snapshot(watched, step=step)
        publisher.publish(snapshot, monitor.probe, monitor.history)
        # Logging that fails does not stop training; this tells of it.
        publisher.failures.report(warnings.warn)
        print(
            f"step {step:>4}  entropy of the teacher's attention {snapshot.metrics['attn/teacher/layer3/entropy']:.3f}"
        )

    for step in range(options.steps):
        if step % options.every == 0:
            look(step)
        batch = draw.choices(images, k=options.batch_size)
        global_crops, local_crops = cut(batch, global_crop, 2), cut(batch, local_crop, 4)
        with torch.no_grad():
            teacher_out = teacher(global_crops)
        loss = loss_function(teacher_out, student(global_crops) + student(local_crops), teacher_temp=0.04)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_momentum(student, teacher, m=0.98)
    look(options.steps)
    assert monitor.previous is not None
    publisher.finish(monitor.probe, monitor.history, monitor.previous)
    publisher.close()
    publisher.failures.report(warnings.warn)
    for logger in loggers:
        logger.finish() if options.wandb else logger.close()


def main() -> None:
    """Train as the command line says, then say where the logs are."""
    parser = argparse.ArgumentParser(description=__doc__)
    logger = parser.add_mutually_exclusive_group()
    logger.add_argument("--wandb", action="store_true", help="log to Weights & Biases instead of TensorBoard")
    logger.add_argument("--archive-only", action="store_true", help="log to no dashboard")
    folder = Path("runs", "plain_pytorch", time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--folder", type=Path, default=folder, help="where to write (default: a new one below runs)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between two snapshots")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message=".*weight_norm. is deprecated")  # of Lightly's projection head
    train(options)
    print(f"logs are in {options.folder}")


if __name__ == "__main__":
    main()
