"""Small trainings of a student and its teacher, wired rightly and in the ways that people got it wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, HealthFlag, HealthLimits
from tests.support.helpers import Distillation, NoiseImages, loader, tiny_vit, trainer

LIMITS = HealthLimits(low_entropy=0.0, high_entropy=1.0, peak=1.0, divergence_growth=1e9, stall_steps=6)


class Averaged(Distillation):
    """The student is trained, then averaged: right, but for what a subclass makes of it."""

    momentum = 0.9

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self.teacher_backbone.eval()

    @torch.no_grad()
    def average(self) -> None:
        for teacher, student in zip(
            self.teacher_backbone.parameters(), self.student_backbone.parameters(), strict=True
        ):
            teacher.mul_(self.momentum).add_(student.detach(), alpha=1 - self.momentum)

    def on_train_batch_end(self, *_: Any) -> None:
        self.average()


# --- wired wrong


class SameModule(Averaged):
    def __init__(self) -> None:
        super().__init__()
        self.teacher_backbone = self.student_backbone.requires_grad_(True)


class ShallowCopy(Averaged):
    def __init__(self) -> None:
        super().__init__()
        self.teacher_backbone = copy.copy(self.student_backbone)


class SameMemory(Averaged):
    """What looks like copying the weights."""

    def __init__(self) -> None:
        super().__init__()
        for teacher, student in zip(
            self.teacher_backbone.parameters(), self.student_backbone.parameters(), strict=True
        ):
            teacher.data = student.data


class AssignedState(Averaged):
    def __init__(self) -> None:
        super().__init__()
        self.teacher_backbone.load_state_dict(self.student_backbone.state_dict(), assign=True)
        self.teacher_backbone.requires_grad_(False)


class InOptimizer(Averaged):
    """`parameters()` that require gradients go into the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher_backbone.requires_grad_(True)


class RequiresGrad(InOptimizer):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*self.student_backbone.parameters(), *self.head.parameters()], lr=1e-2)


class TrainingMode(Averaged):
    """The copy of a student with dropout, in Lightning's training mode."""

    def __init__(self) -> None:
        super().__init__(proj_drop_rate=0.2)
        self.teacher_backbone = copy.deepcopy(self.student_backbone).requires_grad_(False)


class BeforeStep(Averaged):
    """At the end of training_step, which in Lightning is before the optimizer's step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.average()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        pass


class BeforeStepByHook(BeforeStep):
    training_step = Averaged.training_step

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.average()


class Twice(Averaged):
    """At the beginning of training_step, as one example has it, and after the batch, as another does."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.average()
        return super().training_step(batch, batch_idx)


class AveragingCallback(pl.Callback):
    """For a module that averages by itself."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Averaged, *_: Any) -> None:
        pl_module.average()


class Never(Averaged):
    def on_train_batch_end(self, *_: Any) -> None:
        pass


class MomentumOne(Averaged):
    momentum = 1.0


class MomentumZero(Averaged):
    momentum = 0.0


class MomentumZeroAtTheStart(Twice):
    momentum = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        pass


class FrozenStudent(Averaged):
    def __init__(self) -> None:
        super().__init__()
        self.student_backbone.requires_grad_(False)


class ForgottenStudent(Averaged):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=1e-2)


class Detached(Averaged):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            student, teacher = self.student_backbone(batch), self.teacher_backbone(batch)
        return nn.functional.cross_entropy(self.head(student), self.head(teacher).softmax(-1))


class OverTokens(nn.BatchNorm2d):
    """Batch normalisation of tokens (B, h, w, C)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.movedim(-1, 1)).movedim(1, -1)


class ForgottenBuffers(Averaged):
    def __init__(self) -> None:
        super().__init__()
        self.student_backbone.patch_embed.norm = OverTokens(32)  # which has buffers
        self.teacher_backbone = copy.deepcopy(self.student_backbone).requires_grad_(False).eval()


WRONG: dict[str, tuple[type[Averaged], str, str]] = {
    "same module": (SameModule, "shared_weights", "the student itself (student_backbone, teacher_backbone)"),
    "shallow copy": (ShallowCopy, "shared_weights", "the student itself (student_backbone, teacher_backbone)"),
    "same memory": (SameMemory, "shared_weights", "30 of its 30 parameters are in the same memory"),
    "assigned state": (AssignedState, "shared_weights", "30 of its 30 parameters are in the same memory"),
    "in the optimizer": (InOptimizer, "teacher_in_optimizer", "an optimizer holds it and it requires gradients"),
    "requires gradients": (RequiresGrad, "teacher_requires_grad", "it requires gradients, although"),
    "training mode": (TrainingMode, "teacher_in_training_mode", "blocks.0.attn.proj_drop (Dropout) and 5 more make"),
    "before the step": (BeforeStep, "average_before_step", "with a momentum of 0.9 after it has run and before"),
    "before the step, by a hook": (BeforeStepByHook, "average_before_step", "a step behind"),
    "twice": (Twice, "average_updated_twice", "2 times a step (before its forward, after it), with momenta of 0.9 and"),
    "never": (Never, "teacher_stands_still", "it has not moved in 6 steps, and the student has"),
    "momentum 1": (MomentumOne, "teacher_stands_still", "a momentum of 1"),
    "momentum 0": (MomentumZero, "momentum_zero", "it equals the student after each update"),
    "momentum 0, at the start": (MomentumZeroAtTheStart, "momentum_zero", "a momentum of 0"),
    "frozen student": (FrozenStudent, "student_stands_still", "6 steps: all of it is frozen"),
    "student in no optimizer": (ForgottenStudent, "student_stands_still", "no optimizer that stepped holds"),
    "no gradient": (Detached, "student_stands_still", "no gradient reaches it"),
    "forgotten buffers": (ForgottenBuffers, "average_forgets_buffers", "patch_embed.norm.running_mean"),
}


# --- wired right


class AtTheStart(Twice):
    """Lightly's examples average at the beginning of training_step, which is after the step before."""

    def on_train_batch_end(self, *_: Any) -> None:
        pass


class ToOne(Averaged):
    """DINO's schedule, which ends at 1 and then stays there."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.momentum = min(1.0, 0.9 + 0.02 * self.global_step)
        self.average()


class FromZero(ToOne):
    """A running mean: the first momentum is 0."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.momentum = 1 - 1 / self.global_step
        self.average()


class DistilledFromAnother(Never):
    """A frozen teacher that was trained elsewhere, with dropout left on."""

    def __init__(self) -> None:
        super().__init__(proj_drop_rate=0.2)
        self.teacher_backbone = tiny_vit(proj_drop_rate=0.2).requires_grad_(False)


class WithoutForgetting(Never):
    """The teacher is what the student was when this training began, and remains so."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.student_backbone.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        self.teacher_backbone = copy.deepcopy(self.student_backbone).requires_grad_(False)


class GramTeacher(Averaged):
    def __init__(self) -> None:
        super().__init__()
        self.gram_teacher_backbone = copy.deepcopy(self.student_backbone).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        anchor = self.gram_teacher_backbone(batch)
        return super().training_step(batch, batch_idx) + (self.student_backbone(batch) - anchor).square().mean()


class LastLayerFrozen(Averaged):
    """As DINO does in the first epoch."""

    def on_after_backward(self) -> None:
        self.head.weight.grad = None


class HeadOfZeros(Averaged):
    """No gradient reaches the backbone at the first step."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)


class LinearProbing(Never):
    """Of a pair that is loaded, of which one is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.student_backbone.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.student_backbone(batch)).square().mean()


class Probing(pl.LightningModule):
    """Linear probing of one backbone, of which the optimizer gets everything."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = tiny_vit(), nn.Linear(32, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            features = self.backbone(batch)
        return self.head(features).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class AfterTheStepOnly(Averaged):
    """With accumulated gradients: where the optimizer has stepped."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 3 == 2:
            self.average()


class WarmUp(Averaged):
    """Five steps at a learning rate of 0."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step < 5 else 0.1 * (step - 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


class LongWarmUp(Averaged):
    """At 0 until after the last step of the test."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.0)


class FrozenInOptimizer(Averaged):
    """Lightly's examples give the optimizer everything; what requires no gradient is not touched."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SharedPatchEmbedding(Averaged):
    """One for both, trained by the student; each has blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher_backbone.patch_embed = self.student_backbone.patch_embed

    @torch.no_grad()
    def average(self) -> None:
        for teacher, student in zip(
            self.teacher_backbone.parameters(), self.student_backbone.parameters(), strict=True
        ):
            teacher.lerp_(student, 1 - self.momentum)  # of itself nothing new


class ForEvaluation(Averaged):
    """An average that no loss looks at, made by PyTorch, which leaves it requiring gradients."""

    def __init__(self) -> None:
        super().__init__(proj_drop_rate=0.2)
        del self.teacher_backbone
        self.ema = torch.optim.swa_utils.AveragedModel(self.student_backbone)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.student_backbone(batch)).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update_parameters(self.student_backbone)


class ForEvaluationLater(ForEvaluation):
    """It copies at first, as timm's ModelEmaV3 does until ``update_after_step``."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.module.load_state_dict(self.student_backbone.state_dict())


class NowAndThen(Averaged):
    """The student is copied every fourth step, as a target network is."""

    momentum = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step % 4 == 0:
            self.average()


class TwoOptimizers(Averaged):
    """Each steps twice a batch, and the teacher follows each time."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            self.average()

    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        models = self.student_backbone, self.head
        return [torch.optim.SGD(model.parameters(), lr=1e-2) for model in models]


class BuffersToo(ForgottenBuffers):
    def average(self) -> None:
        super().average()
        for teacher, student in zip(self.teacher_backbone.buffers(), self.student_backbone.buffers(), strict=True):
            teacher.copy_(student)


class BuffersAtTheEnd(ForgottenBuffers):
    """Those of an average for evaluation may be made after training, by PyTorch's ``update_bn``."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.student_backbone(batch)).square().mean()


class OwnBuffers(ForgottenBuffers):
    """BYOL's target normalises by its own batches."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher_backbone.train()


RIGHT: dict[str, tuple[type[pl.LightningModule], dict[str, Any]]] = {
    "as it should be": (Averaged, {}),
    "validated": (Averaged, {"val_check_interval": 2}),
    "at the start of training_step": (AtTheStart, {}),
    "a schedule that reaches 1": (ToOne, {}),
    "a schedule from 0": (FromZero, {}),
    "distilled from another": (DistilledFromAnother, {}),
    "without forgetting": (WithoutForgetting, {}),
    "Gram teacher": (GramTeacher, {}),
    "last layer frozen": (LastLayerFrozen, {}),
    "a head of zeros": (HeadOfZeros, {}),
    "linear probing of a pair": (LinearProbing, {}),
    "linear probing": (Probing, {}),
    "accumulation": (Averaged, {"accumulate_grad_batches": 3}),
    "accumulation, averaged after the step": (AfterTheStepOnly, {"accumulate_grad_batches": 3}),
    "warm-up from 0": (WarmUp, {}),
    "long warm-up": (LongWarmUp, {}),
    "frozen in the optimizer": (FrozenInOptimizer, {}),
    "a patch embedding for both": (SharedPatchEmbedding, {}),
    "an average for evaluation": (ForEvaluation, {}),
    "an average for evaluation that begins later": (ForEvaluationLater, {}),
    "copied now and then": (NowAndThen, {}),
    "two optimizers, twice": (TwoOptimizers, {}),
    "buffers copied": (BuffersToo, {}),
    "buffers made at the end": (BuffersAtTheEnd, {}),
    "buffers of its own": (OwnBuffers, {}),
    "bfloat16": (Averaged, {"precision": "bf16-true"}),
}


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> list[HealthFlag]:
    """Ten steps, with two snapshots on the way; the flags that were raised."""
    given = [c for c in callbacks if isinstance(c, AttentionMapCallback)]
    watch = given or [AttentionMapCallback(PROBE, every_n_train_steps=4, dirpath=False, health=LIMITS)]
    others = [c for c in callbacks if c not in given]
    running = trainer(folder, *watch, *others, **{"max_steps": 10, "logger": False, **settings})
    running.fit(module, loader(20, batch_size=2), loader(4))
    assert watch[0].monitor is not None
    return watch[0].monitor.health.flags


PROBE = NoiseImages(2).images
