"""Attention maps from a Hugging Face `Trainer`, by a callback: python examples/hf_trainer.py [--steps 200]."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from photographs import photographs, probe_images
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from attn_monitor import ProbeBatch
from attn_monitor.hugging_face import AttentionMapTrainerCallback

SIZE = 96
# Normalised as ProbeBatch expects it unless told otherwise.
normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
to_input = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize])


class Crops(Dataset[dict[str, Any]]):
    """Random crops of the photographs; the class of a crop is the photograph that it was cut from."""

    def __init__(self, count: int) -> None:
        # Shrunk once, as large photographs would only slow the crops down.
        self.images = [v2.functional.resize(image, 160) for image in photographs().values()]
        self.crop = v2.Compose([v2.RandomResizedCrop(SIZE, (0.2, 1.0)), v2.RandomHorizontalFlip(), to_input])
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = index % len(self.images)
        return {"pixel_values": self.crop(self.images[label]), "labels": label}


def main() -> None:
    """Train as the command line says, then say where the logs are."""
    parser = argparse.ArgumentParser(description=__doc__)
    folder = Path("runs", "hf_trainer", time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--folder", type=Path, default=folder, help="where to write (default: a new one below runs)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between two snapshots")
    options = parser.parse_args()

    data = Crops(1000)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=len(data.images),
    )
    shown = probe_images(SIZE)
    probe = ProbeBatch(torch.stack([to_input(image) for image in shown.values()]), names=[*shown])
    arguments = TrainingArguments(
        output_dir=str(options.folder),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        logging_steps=options.every,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="tensorboard",
    )
    callback = AttentionMapTrainerCallback(probe, every_n_train_steps=options.every)
    Trainer(model=ViTForImageClassification(config), args=arguments, train_dataset=data, callbacks=[callback]).train()
    print(f"logs are in {options.folder}")


if __name__ == "__main__":
    main()
