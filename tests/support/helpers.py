"""Small real models, a real Lightning module and a quiet Trainer that the tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attn_monitor import AttentionMonitor


def tiny_vit(**changes: Any) -> nn.Module:
    """A timm ViT of 16 patches, 4 heads and 2 blocks."""
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    return timm.models.vision_transformer.VisionTransformer(**{**settings, **changes})


class NoiseImages(Dataset[Tensor]):
    """Normal noise, the same for the same index."""

    def __init__(self, count: int = 16, size: int = 32) -> None:
        self.images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class Distillation(pl.LightningModule):
    """A student that follows its own moving average: DINO's shape, small enough for a test."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.student_backbone = tiny_vit(**changes)
        with torch.random.fork_rng():  # of the same weights, and without dropout, as DINO makes it
            self.teacher_backbone = tiny_vit(**{k: v for k, v in changes.items() if not k.endswith("_rate")})
        self.teacher_backbone.load_state_dict(self.student_backbone.state_dict())
        self.teacher_backbone.requires_grad_(False)
        self.head = nn.Linear(32, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        student = self.head(self.student_backbone(batch))
        with torch.no_grad():
            teacher = self.head(self.teacher_backbone(batch))
        loss = nn.functional.cross_entropy(student, (teacher / 0.04).softmax(-1))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.student_backbone(batch).square().mean())

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for teacher, student in zip(
                self.teacher_backbone.parameters(), self.student_backbone.parameters(), strict=True
            ):
                teacher.lerp_(student, 0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def loader(count: int = 16, batch_size: int = 4, shuffle: bool = False, size: int = 32) -> DataLoader[Tensor]:
    """Batches of noise images."""
    return DataLoader(NoiseImages(count, size), batch_size=batch_size, shuffle=shuffle)


def error_of(monitor: AttentionMonitor, models: dict[str, nn.Module]) -> tuple[str, str]:
    """Type and text of what a snapshot raises, for processes that report to a test."""
    try:
        monitor.snapshot(models, step=0)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def trainer(folder: Path, *callbacks: pl.Callback, **changes: Any) -> pl.Trainer:
    """A quiet CPU trainer for 8 steps that logs to TensorBoard below a folder."""
    from lightning.pytorch.loggers import TensorBoardLogger

    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 8,
        "logger": TensorBoardLogger(folder, name="run", version=0),
        "callbacks": list(callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**settings, **changes})
