"""Every model that the capture is tried on: small, with random weights, and what must be found in it.

One list, `CASES`: the tests run over it, and `docs/make_models.py` writes `docs/models.md` from it. Weights are drawn
so that attention is far from uniform: near-uniform maps would agree with anything.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import styles
from tests.support.releases import TRANSFORMERS


@dataclass(frozen=True)
class Case:
    """A model and the attention it has. ``refused`` are the indices of layers that have no map, with a reason."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    grid: tuple[int, int]
    size: tuple[int, int] = (32, 48)
    layers: int = 2
    prefix: int = 1
    mixed: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    query: Any = "cls"
    forward: Callable[[nn.Module, Tensor], Any] | None = None
    without_query: tuple[int, ...] = ()  # layers that have a map, but no such query token
    shapes: Mapping[int, tuple[int, tuple[int, int]]] = field(default_factory=dict, hash=False)  # of the odd layers
    method: tuple[str, str] | None = None  # class and method that give the matrix, where it is not a plain softmax
    slow: bool = False

    @property
    def id(self) -> str:
        """Name in test output."""
        return f"{self.library}-{self.name}".replace(" ", "_")

    def model(self) -> nn.Module:
        """The model in eval mode, built once; tests that change it must copy it."""
        return _built(self)

    def images(self, count: int = 2) -> Tensor:
        """Noise images that are the same every time."""
        return torch.randn(count, 3, *self.size, generator=torch.Generator().manual_seed(1))


@functools.cache
def _built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of their own deprecations while they build
        return enliven(case.build()).eval()


def make_eager(model: Any) -> None:
    """Let a model of Transformers compute attention by its own explicit code."""
    if hasattr(model, "set_attn_implementation"):  # older releases do so by themselves where attention is asked for
        model.set_attn_implementation("eager")


@torch.no_grad()
def enliven(model: nn.Module) -> nn.Module:
    """Redraw the weights so that attention is sharp and every gate, scale and bias takes part."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        if parameter.ndim in (2, 4):
            parameter.copy_(noise * 1.7 / math.sqrt(parameter[0].numel()))
        else:
            parameter.add_(0.3 * noise)
    return model


def hugging_face(model: str, config: str, attention: str, **changes: Any) -> nn.Module:
    """A Hugging Face vision encoder of 2 layers and 4 heads with patches of 8 pixels."""
    import transformers

    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    for name in (model, config):
        if TRANSFORMERS < (5, 0) and not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
    made = getattr(transformers, config)(**{**settings, **changes})
    made._attn_implementation = attention
    built: nn.Module = getattr(transformers, model)(made)
    return built


def timm_model(name: str, *, fused: bool = True, **changes: Any) -> nn.Module:
    """A timm architecture by name, made small by the arguments that its family takes."""
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **changes)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def timm_vit(name: str, *, fused: bool = True, **changes: Any) -> nn.Module:
    """A member of timm's VisionTransformer family with 2 blocks, 4 heads and patches of 8 pixels."""
    settings = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm_model(name, fused=fused, **{**settings, **changes})


def vit_pytorch(module: str, name: str, **changes: Any) -> nn.Module:
    """A model of vit-pytorch."""
    settings = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
    built: nn.Module = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**{**settings, **changes})
    return built


def _hf_cases() -> list[Case]:
    regular: list[tuple[str, str, str, dict[str, Any], dict[str, Any]]] = [
        ("ViT", "ViTModel", "ViTConfig", {}, {}),
        ("DeiT", "DeiTModel", "DeiTConfig", {}, {"prefix": 2}),
        ("BEiT", "BeitModel", "BeitConfig", {"use_relative_position_bias": True}, {}),
        ("DINOv2", "Dinov2Model", "Dinov2Config", {}, {}),
        ("DINOv2 with registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {}, {"prefix": 5}),
        ("DINOv3 ViT", "DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}, {"prefix": 5}),
        ("I-JEPA", "IJepaModel", "IJepaConfig", {}, {"prefix": 0, "query": "mean"}),
        ("MAE encoder", "ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0}, {"forward": styles.mae_in_order}),
        ("CLIP vision tower", "CLIPVisionModel", "CLIPVisionConfig", {}, {}),
        (
            "SigLIP vision tower",
            "SiglipVisionModel",
            "SiglipVisionConfig",
            {},
            {"layers": 3, "prefix": 0, "without_query": (0, 1)},
        ),
    ]
    cases = []
    for name, model, config, changes, expected in regular:
        for attention in ("sdpa", "eager"):
            build = functools.partial(hugging_face, model, config, attention, **changes)
            cases.append(Case("transformers", f"{name}, {attention}", build, (4, 6), **expected))
    return cases


def _timm_cases() -> list[Case]:
    def vit(name: str, changes: dict[str, Any] | None = None, grid: tuple[int, int] = (4, 6), **expected: Any) -> Case:
        label = expected.pop("label", name)
        return Case("timm", label, functools.partial(timm_vit, name, **(changes or {})), grid, **expected)

    cait = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return [
        vit("vit_tiny_patch16_224"),
        vit("vit_tiny_patch16_224", {"fused": False}, label="vit_tiny_patch16_224, fused_attn off"),
        vit("deit_tiny_patch16_224"),
        vit("deit_tiny_distilled_patch16_224", prefix=2),
        vit("deit3_small_patch16_224"),
        vit("vit_small_patch14_reg4_dinov2", prefix=5),
        vit("vit_small_patch16_dinov3", prefix=5),
        vit("eva02_tiny_patch14_224"),
        vit("beit_base_patch16_224"),
        vit("beit_base_patch16_224", {"fused": False}, label="beit_base_patch16_224, fused_attn off"),
        vit(
            "vit_base_patch16_siglip_224",
            layers=3,
            prefix=0,
            without_query=(0, 1),
            label="vit_base_patch16_siglip_224, attention pooling",
        ),
        vit("vit_base_patch16_siglip_gap_224", prefix=0, query="mean"),
        vit("vit_relpos_small_patch16_224", prefix=0, query="mean"),
        vit("vit_medium_patch16_reg4_gap_256", prefix=4, query="mean"),
        vit("naflexvit_base_patch16_gap", prefix=4, query="mean", layers=2)
        if False
        else Case(
            "timm",
            "naflexvit_base_patch16_gap",
            functools.partial(
                timm_model, "naflexvit_base_patch16_gap", patch_size=8, embed_dim=32, depth=2, num_heads=4
            ),
            (4, 6),
            prefix=4,
            query="mean",
        ),
        Case(
            "timm",
            "vit_small_r26_s32_224, hybrid",
            functools.partial(
                timm_model, "vit_small_r26_s32_224", img_size=(64, 96), embed_dim=32, depth=2, num_heads=4
            ),
            (2, 3),
            size=(64, 96),
        ),
        Case(
            "timm",
            "cait_xxs24_224",
            functools.partial(timm_model, "cait_xxs24_224", **cait),
            (4, 4),
            size=(32, 32),
            layers=4,
            mixed=(0, 1),
            without_query=(0, 1),
        ),
        Case(
            "timm",
            "convit_tiny",
            functools.partial(
                timm_model,
                "convit_tiny",
                img_size=32,
                patch_size=8,
                embed_dim=8,
                depth=3,
                num_heads=4,
                local_up_to_layer=2,
            ),
            (4, 4),
            size=(32, 32),
            layers=3,
            mixed=(0, 1),
            without_query=(0, 1),
            method=("GPSA", "get_attention"),
        ),
        Case(
            "timm",
            "xcit_nano_12_p8_224, class attention",
            functools.partial(timm_model, "xcit_nano_12_p8_224", img_size=32, embed_dim=32, depth=2, num_heads=4),
            (4, 6),
            layers=4,
            refused=(0, 1),
        ),
    ]


def open_clip_tower() -> nn.Module:
    """OpenCLIP's vision tower as CLIP builds it."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=8, image_size=(32, 48))
    return CLIP(16, vision, CLIPTextCfg(context_length=8, vocab_size=16, width=16, heads=2, layers=1))


def torchvision_vit() -> nn.Module:
    """torchvision's VisionTransformer, built on nn.MultiheadAttention."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64)


def lightly_wrapper(library: str) -> nn.Module:
    """Lightly's MaskedVisionTransformer around a torchvision or a timm ViT."""
    from lightly.models import modules

    if library == "timm":
        return modules.MaskedVisionTransformerTIMM(timm_vit("vit_tiny_patch16_224", img_size=32))
    return modules.MaskedVisionTransformerTorchvision(torchvision_vit())


def cross_vit() -> nn.Module:
    """CrossViT: two branches with patches of their own size, exchanging their CLS tokens."""
    branch = {"enc_depth": 1, "enc_heads": 4, "enc_mlp_dim": 32, "enc_dim_head": 8, "dim": 32}
    settings = {f"{size}_{key}": value for size in ("sm", "lg") for key, value in branch.items()}
    return getattr(importlib.import_module("vit_pytorch.cross_vit"), "CrossViT")(  # noqa: B009 - untyped package
        image_size=32,
        num_classes=5,
        sm_patch_size=8,
        lg_patch_size=16,
        depth=1,
        cross_attn_depth=1,
        cross_attn_heads=4,
        cross_attn_dim_head=8,
        **settings,
    )


def _other_cases() -> list[Case]:
    square: dict[str, Any] = {"grid": (4, 4), "size": (32, 32)}
    coarse = {1: (1, (2, 2)), 2: (1, (2, 2))}
    own = "hand-written"

    def lucidrains(name: str, module: str, model: str, changes: dict[str, Any] | None = None, **expected: Any) -> Case:
        build = functools.partial(vit_pytorch, module, model, **(changes or {}))
        return Case("vit-pytorch", name, build, **{**square, **expected})

    return [
        Case("torchvision", "VisionTransformer", torchvision_vit, **square),
        lucidrains("ViT", "vit", "ViT"),
        lucidrains("SimpleViT", "simple_vit", "SimpleViT", prefix=0, query="mean"),
        lucidrains("DeepViT, re-attention", "deepvit", "DeepViT", mixed=(0, 1)),
        lucidrains("CaiT", "cait", "CaiT", {"cls_depth": 2}, layers=4, mixed=(0, 1, 2, 3), without_query=(0, 1)),
        Case("vit-pytorch", "CrossViT", cross_vit, layers=4, shapes=coarse, **square),
        Case("open_clip", "vision tower", open_clip_tower, (4, 6), forward=lambda m, x: m.encode_image(x)),
        Case("lightly", "MaskedVisionTransformerTIMM", functools.partial(lightly_wrapper, "timm"), **square),
        Case("lightly", "MaskedVisionTransformerTorchvision", functools.partial(lightly_wrapper, "tv"), **square),
        Case("torch", "nn.TransformerEncoder", styles.EncoderViT, (4, 6)),
        Case(own, "DINO v1", styles.DinoViT, (4, 6)),
        Case(own, "DINOv2, MemEffAttention", styles.Dinov2ViT, (4, 6)),
        Case(own, "DINOv2, forward_features with masks", styles.Dinov2ViT, (4, 6), forward=styles.masked_features),
        Case(own, "DINOv3, RoPE and storage tokens", styles.Dinov3ViT, (4, 6), prefix=5),
        Case(
            own,
            "DINOv3, list of crops",
            styles.Dinov3ViT,
            (4, 6),
            prefix=5,
            layers=4,
            forward=styles.two_crops,
            refused=(1, 3),
        ),
        Case(own, "AoANet, MultiHeadedDotAttention", styles.CaptionEncoder, (4, 6), prefix=0, without_query=(0,)),
        Case(own, "one block used twice, dict of outputs", styles.TwiceViT, (4, 6)),
    ]


CASES = [*_hf_cases(), *_timm_cases(), *_other_cases()]
