"""Trains a ViT with DINO: python examples/train_dino.py --config configs/dino_tiny_cpu.yaml [--data DIR]."""

from __future__ import annotations

import math
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import get_weight_decay_parameters, update_momentum
from lightly.utils.scheduler import cosine_schedule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from photographs import (
    image_files,
    no_masks,
    numbered,
    photograph_files,
    probe_images,
    probe_images_of,
    probe_masks,
    read_rgb,
    write_pngs,
)
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

M = TypeVar("M", bound=nn.Module)


class DINO(L.LightningModule):
    """A student learns to see in any crop of an image what its own moving average sees in the global crops.

    Args:
        img_size: Side of the global crops, in pixels.
        patch_size: Side of a patch, in pixels.
        embed_dim: Width of the backbone.
        depth: Number of transformer blocks.
        num_heads: Attention heads per block.
        drop_path: Stochastic depth of the student; the teacher has none.
        head_hidden_dim: Width of the projection head.
        head_bottleneck_dim: Width of the projection head before its last layer.
        head_output_dim: Number of prototypes.
        freeze_last_layer: Number of epochs in which the last layer of the head is held fixed.
        lr: Learning rate after the warm-up.
        min_lr: Learning rate at the end.
        warmup_steps: Steps of linear learning-rate warm-up.
        weight_decay: Weight decay at the first step.
        weight_decay_end: Weight decay at the last step.
        teacher_momentum: Momentum of the teacher at the first step; it ends at 1.
        student_temp: Softmax temperature of the student.
        warmup_teacher_temp: Softmax temperature of the teacher at the first step.
        teacher_temp: Softmax temperature of the teacher after its warm-up.
        warmup_teacher_temp_steps: Steps of linear teacher-temperature warm-up.
        center_momentum: Momentum of the centre that is taken off the teacher's output.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_path: float = 0.1,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        head_output_dim: int = 65536,
        freeze_last_layer: int = 1,
        lr: float = 5e-4,
        min_lr: float = 1e-6,
        warmup_steps: int = 0,
        weight_decay: float = 0.04,
        weight_decay_end: float = 0.4,
        teacher_momentum: float = 0.996,
        student_temp: float = 0.1,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.07,
        warmup_teacher_temp_steps: int = 0,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        vit = partial(
            VisionTransformer,
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=0,
            dynamic_img_size=True,
        )
        head = partial(
            DINOProjectionHead,
            input_dim=embed_dim,
            hidden_dim=head_hidden_dim,
            bottleneck_dim=head_bottleneck_dim,
            output_dim=head_output_dim,
            freeze_last_layer=freeze_last_layer,
        )
        self.student_backbone = vit(drop_path_rate=drop_path)
        self.student_head = head()
        # Built anew instead of copied: the weight norm in the head cannot be deep-copied.
        self.teacher_backbone = start_as(self.student_backbone, vit())
        self.teacher_head = start_as(self.student_head, head())
        self.loss = DINOLoss(head_output_dim, student_temp=student_temp, center_momentum=center_momentum)

    def forward(self, images: Tensor) -> Tensor:
        """The teacher's image embedding, which is what DINO is used for after training."""
        embedding: Tensor = self.teacher_backbone(images)
        return embedding

    def training_step(self, crops: list[Tensor], batch_idx: int) -> Tensor:
        """One step on [global, global, local, local, ...], each a batch of crops of the same images."""
        global_crops, local_crops = crops[:2], crops[2:]
        with torch.no_grad():
            teacher_out = project(self.teacher_backbone, self.teacher_head, global_crops)
        student_out = project(self.student_backbone, self.student_head, global_crops)
        if local_crops:
            student_out += project(self.student_backbone, self.student_head, local_crops)
        temperature = self.teacher_temperature()
        # Before the loss, which moves the centre on.
        self._log_teacher(torch.cat(teacher_out), temperature)
        loss: Tensor = self.loss(teacher_out, student_out, teacher_temp=temperature)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with weight decay on matrices only; the schedules are set step by step below."""
        decayed, plain = get_weight_decay_parameters([self.student_backbone, self.student_head])
        groups = [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False}]
        return torch.optim.AdamW(groups, weight_decay=0.0, lr=self.hparams["lr"])

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        """Set the learning rate and the weight decay of this step."""
        lr = self.learning_rate()
        weight_decay = self._cosine(self.hparams["weight_decay"], self.hparams["weight_decay_end"])
        optimizer = self.optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer | L.pytorch.core.optimizer.LightningOptimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
            if group["decayed"]:
                group["weight_decay"] = weight_decay
        self.log_dict({"schedule/lr": lr, "schedule/weight_decay": weight_decay})

    def on_after_backward(self) -> None:
        """Hold the prototypes still while the features below them are still noise."""
        self.student_head.cancel_last_layer_gradients(self.current_epoch)

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        """Move the teacher towards the student that this step has changed."""
        momentum = self._cosine(self.hparams["teacher_momentum"], 1.0)
        update_momentum(self.student_backbone, self.teacher_backbone, m=momentum)
        update_momentum(self.student_head, self.teacher_head, m=momentum)
        self.log("schedule/teacher_momentum", momentum)

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to min_lr."""
        lr, min_lr, warmup = (float(self.hparams[key]) for key in ("lr", "min_lr", "warmup_steps"))
        if self.global_step < warmup:
            return lr * (self.global_step + 1) / warmup
        step, steps = self.global_step - int(warmup), self._total_steps() - int(warmup)
        return float(cosine_schedule(step, steps, lr, min_lr))

    def teacher_temperature(self) -> float:
        """Linear warm-up, then constant."""
        start, end = self.hparams["warmup_teacher_temp"], self.hparams["teacher_temp"]
        done = self.global_step / max(1, self.hparams["warmup_teacher_temp_steps"])
        return float(start + (end - start) * min(1.0, done))

    def _cosine(self, start: float, end: float) -> float:
        steps = self._total_steps()
        return float(cosine_schedule(min(self.global_step, steps), steps, start, end))

    def _total_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    @torch.no_grad()
    def _log_teacher(self, out: Tensor, temperature: float) -> None:
        """Show both collapses: entropy_each -> 1 (never sure), entropy_mean -> 0 (the same for all crops)."""
        probabilities = ((out - self.loss.center.squeeze(0)) / temperature).softmax(dim=-1)
        self.log("train/teacher_entropy_each", entropy(probabilities).mean())
        self.log("train/teacher_entropy_mean", entropy(probabilities.mean(dim=0)))


class CropDataset(Dataset[list[Tensor]]):
    """Random crops of image files, in the order [global, global, local, local, ...].

    With few photographs, an item is a random window of one rather than all of it, so that
    different items of a photograph have different things to tell apart.
    """

    def __init__(self, files: Sequence[Path], transforms: Sequence[nn.Module], window: tuple[float, float]) -> None:
        self.files = files
        self.transforms = transforms
        self.window = window

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = random_window(load_image(self.files[index]), self.window)
        return [transform(image) for transform in self.transforms]


class Photographs(L.LightningDataModule):
    """Multi-crops of the photographs in scikit-image and scikit-learn, or of a folder of images.

    Args:
        folder: Image folder, searched recursively; None takes the ten photographs.
        batch_size: Images per step.
        samples_per_epoch: Images drawn per epoch, with replacement.
        num_workers: Processes that cut crops.
        window: Smallest and largest part of an image's area that one item is cut from.
        global_size: Side of the two global crops, in pixels.
        global_scale: Smallest and largest part of the window in a global crop.
        local_size: Side of the local crops, in pixels.
        local_scale: Smallest and largest part of the window in a local crop.
        local_crops: Number of local crops.
        probe_folder: Where the probe images are written; None writes none.
        mask_folder: Where masks of the objects in them are written; empty ones for a folder, whose objects are unknown.
        probe_size: Side of the probe images, in pixels.
        probe_count: Number of probe images, at most eight of the photographs.
    """

    def __init__(
        self,
        folder: str | None = None,
        batch_size: int = 16,
        samples_per_epoch: int = 1024,
        num_workers: int = 1,
        window: tuple[float, float] = (1.0, 1.0),
        global_size: int = 224,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_size: int = 96,
        local_scale: tuple[float, float] = (0.05, 0.4),
        local_crops: int = 8,
        probe_folder: str | None = None,
        mask_folder: str | None = None,
        probe_size: int = 224,
        probe_count: int = 8,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        """Write the probe images, from the same source as the training images, and the objects in them."""
        folder, size = self.hparams["folder"], self.hparams["probe_size"]
        probe_folder, mask_folder = self.hparams["probe_folder"], self.hparams["mask_folder"]
        if probe_folder is None:
            return
        count = self.hparams["probe_count"]
        images = probe_images_of(folder, size, count) if folder else numbered(probe_images(size), count)
        write_pngs(probe_folder, images)
        if mask_folder is not None:
            write_pngs(mask_folder, no_masks(images) if folder else numbered(probe_masks(size), count))

    def train_dataloader(self) -> DataLoader[list[Tensor]]:
        """Batches of crops, each batch a list of tensors."""
        dataset = CropDataset(self._files(), self._transforms(), self.hparams["window"])
        workers = self.hparams["num_workers"]
        return DataLoader(
            dataset,
            batch_size=self.hparams["batch_size"],
            sampler=RandomSampler(dataset, replacement=True, num_samples=self.hparams["samples_per_epoch"]),
            num_workers=workers,
            persistent_workers=workers > 0,
            drop_last=True,
        )

    def _files(self) -> list[Path]:
        folder = self.hparams["folder"]
        return image_files(folder) if folder else list(photograph_files().values())

    def _transforms(self) -> list[nn.Module]:
        big, small = self.hparams["global_size"], self.hparams["local_size"]
        big_scale, small_scale = self.hparams["global_scale"], self.hparams["local_scale"]
        # The probabilities of blur and solarisation are those of the published augmentation.
        first = crop_transform(big, big_scale, blur=1.0, solarize=0.0)
        second = crop_transform(big, big_scale, blur=0.1, solarize=0.2)
        local = crop_transform(small, small_scale, blur=0.5, solarize=0.0)
        return [first, second] + [local] * self.hparams["local_crops"]


class ProgressLines(L.Callback):
    """Prints a line now and then, which reads the same in a terminal and in a log file.

    Args:
        every_seconds: Time between two lines.
    """

    def __init__(self, every_seconds: float = 15.0) -> None:
        self.every_seconds = every_seconds
        self.started = self.printed = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.started = self.printed = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print, if it is time to."""
        now, step, steps = time.monotonic(), trainer.global_step, int(trainer.estimated_stepping_batches)
        if now - self.printed < self.every_seconds and 1 < step < steps:
            return
        self.printed, spent = now, now - self.started
        left = spent / step * (steps - step)
        loss = float(trainer.callback_metrics["train/loss"])
        # Flushed, as a log file would otherwise show nothing for minutes.
        print(f"step {step:>5}/{steps}  loss {loss:6.3f}  {spent:4.0f} s, {left:4.0f} s left", flush=True)


class TrainCLI(LightningCLI):
    """LightningCLI in which --data DIR names a folder of images."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Read --data as --data.folder; LightningCLI would take it for a file with settings."""
        words = sys.argv[1:] if args is None else args
        if not isinstance(words, list):
            return super().parse_arguments(parser, args)
        self.config = parser.parse_args([re.sub(r"^--data(?==|$)", "--data.folder", word) for word in words])

    def before_instantiate_classes(self) -> None:
        """Check the folder now: one line reads better than a traceback out of the training loop."""
        folder = self.config.data.folder
        try:
            image_files(folder) if folder else photograph_files()
        except FileNotFoundError as error:
            sys.exit(f"error: --data: {error}")


def project(backbone: nn.Module, head: nn.Module, crops: Sequence[Tensor]) -> list[Tensor]:
    """Prototype scores of crops of one size, computed as one batch."""
    return list(head(backbone(torch.cat(list(crops)))).chunk(len(crops)))


def start_as(student: nn.Module, teacher: M) -> M:
    """The teacher with the student's weights, and without gradients."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return teacher


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy over the last axis, as a fraction of the largest possible."""
    nats: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return nats / math.log(probabilities.shape[-1])


def crop_transform(size: int, scale: tuple[float, float], blur: float, solarize: float) -> nn.Module:
    """DINO's augmentation for one kind of crop."""
    transform: nn.Module = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            # Published for 224-px crops; the kernel grows with the crop so that the picture loses as much.
            v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 2.0 * size / 224))], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return transform


@lru_cache(maxsize=256)
def load_image(file: Path, shorter_edge: int = 512) -> Tensor:
    """An image file as a tensor, not larger than the crops need, kept for the next time it is drawn."""
    image = read_rgb(file)
    factor = shorter_edge / min(image.size)
    if factor < 1:
        size = round(image.width * factor), round(image.height * factor)
        image = image.resize(size, Image.Resampling.BOX)
    tensor: Tensor = v2.functional.pil_to_tensor(image)
    return tensor


def random_window(image: Tensor, scale: tuple[float, float]) -> Tensor:
    """A random part of an image with the image's aspect ratio and a share of its area drawn from `scale`."""
    share = float(torch.empty(()).uniform_(*scale)) ** 0.5
    height, width = round(image.shape[-2] * share), round(image.shape[-1] * share)
    top = int(torch.randint(image.shape[-2] - height + 1, ()))
    left = int(torch.randint(image.shape[-1] - width + 1, ()))
    return image[..., top : top + height, left : left + width]


def attention_summary(log_dir: Path) -> str:
    """The teacher's last-layer attention entropy, head by head, in the first and in the last snapshot."""
    files = sorted(log_dir.rglob("attn_monitor*/step-*.npz"))
    if not files:
        return f"no attention snapshots in {log_dir}"
    newest = max(files, key=lambda file: file.stat().st_mtime).parent
    files = sorted(newest.glob("step-*.npz"))
    # Imported here, so that a run without the callback does not need its package.
    from attn_monitor import AttentionSnapshot

    first, last = (
        {
            (key.layer, key.head): value
            for key, value in AttentionSnapshot.load(file).metrics.items()
            if (key.role, key.metric) == ("teacher", "entropy") and key.head is not None
        }
        for file in (files[0], files[-1])
    )
    if not last:
        return f"no attention entropy of the teacher in {files[-1]}"
    deepest = max(layer for layer, _ in last)
    span = f"{files[0].stem} -> {files[-1].stem}"
    lines = [f"attention entropy of the teacher's last layer (layer {deepest}), {span}:"]
    for layer, head in sorted(last):
        if layer == deepest:
            before = f"{first[layer, head]:.3f}" if (layer, head) in first else "  -  "
            lines.append(f"  head {head}:  {before} -> {last[layer, head]:.3f}")
    return "\n".join(lines)


def tensorboard_command(log_dir: Path) -> str:
    """The command that shows the run, from the environment this program runs in."""
    program = Path(sys.executable).parent / "tensorboard"
    # TensorBoard keeps ten images per tag unless told otherwise, and the way the maps form would be lost.
    words = [str(program), "--logdir", str(log_dir), "--samples_per_plugin", "images=1000"]
    return shlex.join(words)


def report(log_dir: Path, seconds: float, steps: int, planned: int, tensorboard: bool) -> str:
    """What was done and what to do next, as the last thing on the screen."""
    snapshots = len(list(log_dir.rglob("attn_monitor*/step-*.npz")))
    size = sum(file.stat().st_size for file in log_dir.rglob("*") if file.is_file()) / 1e6
    done = f"trained all {steps} steps" if steps >= planned else f"stopped at step {steps} of {planned}"
    look = ["look at them with", f"  {tensorboard_command(log_dir)}", "then open the address it prints"]
    return "\n".join(
        [
            "",
            f"{done}, in {seconds:.0f} s; {snapshots} snapshots, {size:.0f} MB; logs are in {log_dir}",
            "",
            attention_summary(log_dir),
            *(["", *look] if tensorboard else []),
            *report_page(log_dir),
        ]
    )


def report_page(log_dir: Path) -> list[str]:
    """Where the page is that the callback has written, which plays the run."""
    pages = sorted(log_dir.rglob("attn_monitor*/report.html"), key=lambda page: page.stat().st_mtime)
    return ["", "open the report in a browser to explore the run:", f"  {pages[-1].resolve()}"] if pages else []


def quiet_libraries() -> None:
    """Drop the notices of Lightly and Lightning about their own use of PyTorch."""
    for message in (".*weight_norm. is deprecated", ".*LeafSpec.* is deprecated"):
        warnings.filterwarnings("ignore", message=message)


def leave_cores_for(workers: int) -> None:
    """Keep PyTorch off the cores that cut crops: threads that share a core keep each other waiting."""
    torch.set_num_threads(max(1, torch.get_num_threads() - workers))


def main(args: ArgsType = None, model: type[DINO] = DINO) -> None:
    """Train as configured, then say where the results are."""
    quiet_libraries()
    description = "Trains a ViT with DINO; --data DIR takes a folder of images instead of the photographs."
    cli = TrainCLI(
        model,
        Photographs,
        parser_kwargs={"description": description},
        args=args,
        run=False,
        auto_configure_optimizers=False,
    )
    leave_cores_for(cli.datamodule.hparams["num_workers"])
    started = time.monotonic()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    log_dir = Path(cli.trainer.log_dir or cli.trainer.default_root_dir)
    if cli.trainer.is_global_zero:
        seconds, planned = time.monotonic() - started, cli.trainer.max_steps
        tensorboard = any(isinstance(logger, TensorBoardLogger) for logger in cli.trainer.loggers)
        print(report(log_dir, seconds, cli.trainer.global_step, planned, tensorboard), flush=True)


if __name__ == "__main__":
    main()
