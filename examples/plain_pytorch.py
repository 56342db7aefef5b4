"""Attention maps from a hand-written DINO loop, without Lightning: python examples/plain_pytorch.py [--wandb]."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import update_momentum
from photographs import photographs, probe_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from attn_monitor import ProbeBatch, Watch

PROTOTYPES = 256
normalize = v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)  # which ProbeBatch undoes unless told otherwise
to_input = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize])
augment = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4)])
global_crop = v2.Compose([v2.RandomResizedCrop(64, (0.4, 1.0)), augment])
local_crop = v2.Compose([v2.RandomResizedCrop(32, (0.1, 0.4)), augment])


def network() -> nn.Sequential:
    """A small vision transformer, and DINO's projection head."""
    vit = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "num_classes": 0}
    return nn.Sequential(VisionTransformer(**vit, dynamic_img_size=True), DINOProjectionHead(96, 256, 64, PROTOTYPES))


def project(model: nn.Module, crops: list[Tensor]) -> list[Tensor]:
    """Prototype scores of several batches of crops of one size, computed as one batch."""
    return list(model(torch.cat(crops)).chunk(len(crops)))


def cut(images: list[Tensor], crop: nn.Module, times: int) -> list[Tensor]:
    """Batches of random crops: the same images in each."""
    return [to_input(torch.stack([crop(image) for image in images])) for _ in range(times)]


def open_loggers(options: argparse.Namespace) -> list[Any]:
    """What is logged to; with an empty list the archive and the latest pictures are written."""
    if options.archive_only:
        return []
    if options.wandb:
        import wandb

        return [wandb.init(project="dino", dir=options.folder)]  # WANDB_MODE=offline needs no account
    return [SummaryWriter(options.folder)]


def train(options: argparse.Namespace) -> None:
    """DINO: the student learns to see in any crop what its own moving average sees in the global crops."""
    torch.manual_seed(0)
    images = [v2.functional.resize(v2.functional.pil_to_tensor(image), 128) for image in photographs().values()]
    student, teacher = network(), network().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    loss_function = DINOLoss(PROTOTYPES)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    shown = probe_images(128)
    probe = ProbeBatch(torch.stack([to_input(image) for image in shown.values()]), names=[*shown])
    loggers = open_loggers(options)
    models, every = {"student": student, "teacher": teacher}, options.every
    with Watch(models, probe, loggers=loggers, folder=options.folder, every_n_train_steps=every) as watch:
        for step in range(options.steps):
            watch.step(step)
            batch = [images[i] for i in torch.randint(len(images), (8,))]
            global_crops, local_crops = cut(batch, global_crop, 2), cut(batch, local_crop, 4)
            with torch.no_grad():
                targets = project(teacher, global_crops)
            loss = loss_function(targets, project(student, global_crops) + project(student, local_crops), 0.04)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update_momentum(student, teacher, m=0.98)
        watch.close(options.steps)
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
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message=".*weight_norm. is deprecated")  # of Lightly's projection head
    train(options)
    print(f"logs are in {options.folder}")


if __name__ == "__main__":
    main()
