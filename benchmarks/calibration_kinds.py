"""The trainings of `benchmarks.calibration_runs`: a recipe for each kind, with the models and losses that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

STEPS, SIDE, PATCH, DIM, PROTOTYPES = 100, 24, 8, 48, 128
CLASSES = 10  # at most, of all data sets


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; each fault changes one or two of them."""

    lr: float = 5e-4
    momentum: float = 0.99
    weight_decay: float = 0.04
    teacher_temperature: float = 0.02
    centring: float = 0.9
    head: torch.dtype = torch.float32
    images: int | None = None
    method: Literal["dino", "variance", "mae", "simclr", "supervised"] = "dino"
    sharp: float = 1.0  # times the initial weights of q and k
    attention_lr: float = 1.0  # times the learning rate, of q and k alone
    bottleneck: int = 64  # channels of a prototype
    copied: int = PROTOTYPES  # prototypes that differ at the start
    patch_steps: int = 0  # steps with a loss on patches
    later: float = 1.0  # times the learning rate, after the steps with a loss on patches
    covariance: float = 1.0  # weight of that term in the method "variance"
    directions: int = DIM  # of features that its loss reads


HEALTHY = Recipe()
VARIANCE = replace(HEALTHY, method="variance", lr=5e-3, momentum=0.9)
PATCHES = replace(HEALTHY, lr=2e-3, momentum=0.9, patch_steps=STEPS)
KINDS = {
    "healthy": HEALTHY,
    "no centring": replace(HEALTHY, centring=1.0),
    "teacher = student": replace(HEALTHY, momentum=0.0),
    "temperature 1": replace(HEALTHY, teacher_temperature=1.0),
    "learning rate x 10": replace(HEALTHY, lr=5e-3),
    "momentum 0.5": replace(HEALTHY, momentum=0.5),
    "bf16 head": replace(HEALTHY, head=torch.bfloat16),
    "no weight decay": replace(HEALTHY, weight_decay=0.0),
    "one image": replace(HEALTHY, images=1),
    "q and k too large": replace(HEALTHY, sharp=20.0),
    "learning rate of q and k x 1000": replace(HEALTHY, attention_lr=1000.0),
    "copied prototypes": replace(HEALTHY, copied=32),
    "prototypes of two channels": replace(HEALTHY, bottleneck=2),
    "variance without covariance": replace(VARIANCE, covariance=0.0),
    "loss on one direction": replace(VARIANCE, directions=1),
    "loss on patches ends": replace(PATCHES, patch_steps=STEPS // 2, later=5.0),
    "loss on patches, healthy": PATCHES,
    "variance and covariance, healthy": VARIANCE,
    "MAE, healthy": replace(HEALTHY, method="mae"),
    "SimCLR, healthy": replace(HEALTHY, method="simclr"),
    "supervised, healthy": replace(HEALTHY, method="supervised"),
}


class Training(NamedTuple):
    """What `benchmarks.calibration_runs` trains.

    Args:
        backbones: by role.
        around: modules that hold them, and the criterion.
        loss: of two views (B, 3, 24, 24) and labels (B,) at a step.
        after: what follows an optimizer step.
        parameters: what is trained.
    """

    backbones: dict[str, nn.Module]
    around: list[nn.Module]
    loss: Callable[[list[Tensor], Tensor, int], Tensor]
    after: Callable[[], None]
    parameters: list[nn.Parameter]


class Branch(nn.Module):
    """A backbone and its projection head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = _backbone()
        for block in self.backbone.blocks:
            with torch.no_grad():
                block.attn.qkv.weight[: 2 * DIM] *= recipe.sharp
        self.head = DINOProjectionHead(DIM, 96, recipe.bottleneck, PROTOTYPES, freeze_last_layer=0).to(recipe.head)
        if recipe.copied < PROTOTYPES:
            with torch.no_grad():
                rows = next(p for p in self.head.last_layer.parameters() if p.shape == (PROTOTYPES, recipe.bottleneck))
                rows.copy_(rows[: recipe.copied].repeat(PROTOTYPES // recipe.copied, 1) + 1e-3 * torch.randn_like(rows))
        self.dtype = recipe.head

    def forward(self, images: Tensor) -> Tensor:
        """Outputs of the head, float32."""
        out: Tensor = self.head(self.backbone(images).to(self.dtype)).float()
        return out

    def patches(self, images: Tensor) -> Tensor:
        """Patch tokens of all images at unit length, (B · N, D)."""
        return nn.functional.normalize(self.backbone.forward_features(images)[:, 1:].flatten(0, 1), dim=-1)


def _backbone(drop: float = 0.0, *, starts: bool = True) -> VisionTransformer:
    """A ViT of two layers; its CLS token depends on the image from the start, as runs are too short to learn that."""
    backbone = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=DIM, depth=2, num_heads=4, num_classes=0, patch_drop_rate=drop
    )
    for module in backbone.modules() if starts else ():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return backbone


def training_of(recipe: Recipe) -> Training:
    """Make the models and the loss of a recipe."""
    if recipe.method in ("dino", "variance"):
        return _distillation(recipe)
    return {"mae": _mae, "simclr": _simclr, "supervised": _supervised}[recipe.method]()


def _distillation(recipe: Recipe) -> Training:
    """A student and its average: DINO, with a loss on patches at first or not, or VICReg's terms on features."""
    student, teacher = Branch(recipe), Branch(recipe)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    criterion = DINOLoss(PROTOTYPES, warmup_teacher_temp_epochs=0, center_momentum=recipe.centring)

    def dino(views: list[Tensor], labels: Tensor, step: int) -> Tensor:
        both = torch.cat(views)
        with torch.no_grad():
            targets = list(teacher(both).chunk(2))
        found: Tensor = criterion(targets, list(student(both).chunk(2)), teacher_temp=recipe.teacher_temperature)
        return found if step >= recipe.patch_steps else 0.1 * found + _patch_loss(student, teacher, views[0])

    axes, _ = torch.linalg.qr(torch.randn(DIM, recipe.directions))

    def variance(views: list[Tensor], labels: Tensor, step: int) -> Tensor:
        both = torch.cat(views)
        with torch.no_grad():
            targets = teacher.backbone(both)
        features = student.backbone(both)
        away = (features - targets.roll(len(views[0]), 0)).square().mean()
        read = features @ axes
        centred = read - read.mean(0)
        covariance = centred.T @ centred / (len(centred) - 1)
        beside = covariance - covariance.diag().diag()
        spread = torch.relu(1 - (covariance.diag() + 1e-4).sqrt()).mean()
        return away + spread + recipe.covariance * beside.square().sum() / DIM

    @torch.no_grad()
    def follow() -> None:
        for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            theirs.lerp_(ours, 1 - recipe.momentum)

    backbones: dict[str, nn.Module] = {"student": student.backbone, "teacher": teacher.backbone}
    loss = dino if recipe.method == "dino" else variance
    parameters = [p for p in student.parameters() if p.requires_grad]
    return Training(backbones, [student, teacher, criterion], loss, follow, parameters)


def _patch_loss(student: Branch, teacher: Branch, images: Tensor) -> Tensor:
    """Tell each patch, a little brighter, from all others of the batch."""
    with torch.no_grad():
        targets = teacher.patches(images * 1.1 + 0.1)
    found = student.patches(images) @ targets.T / 0.2
    return nn.functional.cross_entropy(found, torch.arange(len(found)))


def _mae() -> Training:
    """Masked autoencoding: half of the patches are seen, and the image at half its size is predicted from them."""
    backbone = _backbone(0.5, starts=False)
    decoder = nn.Sequential(nn.Linear(DIM, 128), nn.GELU(), nn.Linear(128, 3 * SIDE * SIDE // 4))

    def loss(views: list[Tensor], labels: Tensor, step: int) -> Tensor:
        target = nn.functional.avg_pool2d(views[0], 2).flatten(1)
        return (decoder(backbone(views[0])) - target).square().mean()

    return _without_teacher(backbone, decoder, loss)


def _simclr() -> Training:
    backbone, criterion = _backbone(), NTXentLoss(temperature=0.2)
    projector = nn.Sequential(nn.Linear(DIM, 96), nn.GELU(), nn.Linear(96, 32))

    def loss(views: list[Tensor], labels: Tensor, step: int) -> Tensor:
        found: Tensor = criterion(*projector(backbone(torch.cat(views))).chunk(2))
        return found

    return _without_teacher(backbone, projector, loss)


def _supervised() -> Training:
    backbone, classifier = _backbone(), nn.Linear(DIM, CLASSES)

    def loss(views: list[Tensor], labels: Tensor, step: int) -> Tensor:
        return nn.functional.cross_entropy(classifier(backbone(views[0])), labels)

    return _without_teacher(backbone, classifier, loss)


def _without_teacher(
    backbone: nn.Module, head: nn.Module, loss: Callable[[list[Tensor], Tensor, int], Tensor]
) -> Training:
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    return Training({"backbone": backbone}, [model], loss, lambda: None, list(model.parameters()))
