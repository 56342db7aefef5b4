"""Backbones and their roles in modules laid out like the repositories that people train with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from attn_monitor.capture.backbones import find_backbones, resolve_targets
from attn_monitor.errors import NoAttentionError, TargetError
from tests.support import zoo
from tests.support.helpers import tiny_vit
from tests.support.releases import TRANSFORMERS

vit = functools.partial(tiny_vit, depth=1)


def head() -> nn.Module:
    """A projection head, with a word in its layers that must not be taken for attention."""
    return nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))


def module(**parts: nn.Module) -> nn.Module:
    """A module with these children, like a LightningModule that sets attributes."""
    made = nn.Module()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def multi_crop_wrapper() -> nn.Module:
    return module(backbone=vit(), head=head())


def meta_arch() -> nn.Module:
    def branch() -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": vit(), "dino_head": head(), "ibot_head": head()})

    arch = module(student=branch(), teacher=branch())
    arch.model_ema = arch.teacher
    arch.gram_teacher = nn.ModuleDict({"backbone": vit()})
    return arch


def embedding_model() -> nn.Module:
    return module(wrapped_model=module(_model=vit()), embed=nn.Linear(32, 32))


def shared_patch_embedding() -> nn.Module:
    """Of student and teacher; the predictor merely refers to it."""
    made = module(student=vit(), teacher=vit(), predictor=nn.Module())
    made.teacher.patch_embed = made.predictor.patch_embed = made.student.patch_embed
    made.predictor.attn = nn.Linear(2, 2)
    return made


def shared() -> nn.Module:
    """The teacher is the student itself until training starts."""
    made = module(student_backbone=vit())
    made.teacher_backbone = made.student_backbone
    return made


def hugging_face(name: str, config: str, **changes: Any) -> nn.Module:
    return zoo.hugging_face(name, config, "sdpa", **changes)


def mae() -> nn.Module:
    """Lightly's masked autoencoder: an encoder, and a decoder that attends but embeds no patches."""
    decoder = module(decoder_embed=nn.Linear(32, 32), decoder_blocks=nn.TransformerEncoderLayer(32, 4))
    return module(backbone=zoo.lightly_wrapper("timm"), decoder=decoder)


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "Lightly": (
        lambda: module(
            teacher_backbone=vit(),
            teacher_head=head(),
            student_backbone=vit(),
            student_head=head(),
            criterion=nn.Identity(),
        ),
        {"student": "student_backbone", "teacher": "teacher_backbone"},
    ),
    "Lightly, backbone as teacher": (
        lambda: module(backbone=vit(), projection_head=head(), student_backbone=vit(), student_projection_head=head()),
        {"student": "student_backbone", "teacher": "backbone"},
    ),
    "DINO, dino_pl": (
        lambda: module(student=multi_crop_wrapper(), teacher=multi_crop_wrapper()),
        {"student": "student.backbone", "teacher": "teacher.backbone"},
    ),
    "DINO, distributed student": (
        lambda: module(student=module(module=multi_crop_wrapper()), teacher=multi_crop_wrapper()),
        {"student": "student.module.backbone", "teacher": "teacher.backbone"},
    ),
    "DINOv2, DINOv3 SSLMetaArch": (
        meta_arch,
        {"student": "student.backbone", "teacher": "teacher.backbone", "gram_teacher": "gram_teacher.backbone"},
    ),
    "solo-learn": (
        lambda: module(
            backbone=vit(),
            projector=head(),
            momentum_backbone=vit(),
            momentum_projector=head(),
            classifier=nn.Linear(32, 8),
        ),
        {"student": "backbone", "teacher": "momentum_backbone"},
    ),
    "lightly-train": (
        lambda: module(
            student_embedding_model=embedding_model(), teacher_embedding_model=embedding_model(), student_head=head()
        ),
        {
            "student": "student_embedding_model.wrapped_model._model",
            "teacher": "teacher_embedding_model.wrapped_model._model",
        },
    ),
    "stable-pretraining TeacherStudentWrapper": (
        lambda: module(backbone=module(student=vit(), teacher=vit()), projector=head()),
        {"student": "backbone.student", "teacher": "backbone.teacher"},
    ),
    "MoCo v3": (
        lambda: module(base_encoder=vit(), momentum_encoder=vit(), predictor=head()),
        {"student": "base_encoder", "teacher": "momentum_encoder"},
    ),
    "BYOL": (
        lambda: module(online_encoder=vit(), target_encoder=vit()),
        {"student": "online_encoder", "teacher": "target_encoder"},
    ),
    "backbone_student": (
        lambda: module(backbone_student=vit(), backbone_teacher=vit()),
        {"student": "backbone_student", "teacher": "backbone_teacher"},
    ),
    "encoder_teacher": (
        lambda: module(encoder=vit(), encoder_teacher=vit()),
        {"student": "encoder", "teacher": "encoder_teacher"},
    ),
    "momentum_teacher": (
        lambda: module(student=vit(), momentum_teacher=vit()),
        {"student": "student", "teacher": "momentum_teacher"},
    ),
    "MoCo": (lambda: module(encoder_q=vit(), encoder_k=vit()), {"student": "encoder_q", "teacher": "encoder_k"}),
    "camel case": (
        lambda: module(studentNet=vit(), modelEMA=vit()),
        {"student": "studentNet", "teacher": "modelEMA"},
    ),
    "whole words only": (lambda: module(semantic_encoder=vit()), {"backbone": "semantic_encoder"}),
    "words within words": (
        lambda: module(monkey_encoder=vit(), schema=vit()),
        {"monkey_encoder": "monkey_encoder", "schema": "schema"},
    ),
    "MAE": (mae, {"backbone": "backbone.vit"}),
    "shared weights": (shared, {"student": "student_backbone"}),
    "shared patch embedding": (shared_patch_embedding, {"student": "student", "teacher": "teacher"}),
    "Hugging Face model.vit": (
        lambda: module(model=hugging_face("ViTForImageClassification", "ViTConfig")),
        {"backbone": "model.vit"},
    ),
    "Hugging Face DINOv2": (
        lambda: module(encoder=hugging_face("Dinov2Model", "Dinov2Config")),
        {"backbone": "encoder"},
    ),
    "Hugging Face CLIP": (
        lambda: module(clip=hugging_face("CLIPVisionModel", "CLIPVisionConfig")),
        {"backbone": "clip" if TRANSFORMERS >= (5, 0) else "clip.vision_model"},
    ),
    "torchvision": (lambda: module(net=zoo.torchvision_vit()), {"backbone": "net"}),
    "open_clip": (zoo.open_clip_tower, {"backbone": "visual"}),
    "vit-pytorch": (lambda: module(net=zoo.vit_pytorch("vit", "ViT")), {"backbone": "net"}),
    "plain supervised": (
        lambda: module(model=vit(), accuracy=nn.Identity(), teacher_forcing=nn.Linear(2, 2)),
        {"backbone": "model"},
    ),
    "the model itself": (vit, {"backbone": ""}),
    "two towers": (lambda: module(left=vit(), right=vit()), {"left": "left", "right": "right"}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LAYOUTS)
def test_roles_are_found(name: str) -> None:
    build, expected = LAYOUTS[name]
    made = build()
    assert find_backbones(made) == expected
    assert list(find_backbones(made)) == list(expected), "student before teacher"
    for role, found in resolve_targets(made, expected).items():
        assert found is made.get_submodule(expected[role])


def test_compiled_backbones_are_found() -> None:
    made = module(student=torch.compile(vit(), backend="eager"), teacher=vit())
    assert find_backbones(made) == {"student": "student._orig_mod", "teacher": "teacher"}


def test_nothing_to_find() -> None:
    """A convolutional network has no attention; in anything else it may be where names do not tell."""
    with pytest.raises(NoAttentionError) as caught:
        find_backbones(module(encoder=nn.Conv2d(3, 8, 3), head=head()))
    assert "no attention: it is a convolutional network (encoder (Conv2d), head (Sequential))" in str(caught.value)
    assert "targets=" not in str(caught.value)
    with pytest.raises(NoAttentionError) as caught:
        find_backbones(module(encoder=nn.Conv2d(3, 8, 4, 4), head=head()))
    for word in ("encoder (Conv2d)", "head (Sequential)", "patch embedding and attention", "targets={"):
        assert word in str(caught.value)


def test_targets_given_by_the_user() -> None:
    made = module(net=module(encoder=vit()), probe=vit())
    assert resolve_targets(made, {"student": "net.encoder"}) == {"student": made.net.encoder}
    with pytest.raises(
        TargetError, match=r"targets\['student'\]='net.encodr' is not a submodule.*did you mean 'net.encoder'"
    ):
        resolve_targets(made, {"student": "net.encodr"})
    with pytest.raises(TargetError, match=r"targets\['x'\]='zzz'.*it has net, probe"):
        resolve_targets(made, {"x": "zzz"})
